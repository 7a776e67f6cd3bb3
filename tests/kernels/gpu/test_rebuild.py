"""Workspaces of rebuilt, exact and fresh heads against ones filled token by token in float64."""

import pytest
import torch

from echokv_kernels.rebuild import materialize as reference
from echokv_kernels.reconstruct import EchoMaps, FeatureSource

ROTATION_BLOCKS = [0, 1, 16, 64, 256]


def poison(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


class Scene:
    """A batch of four requests, some compressed, with pages of both groups and a workspace.

    Places of the layer's discarded heads that belong to another echo group keep their poison.
    """

    def __init__(
        self, kit, rotation_block=64, head_dim=32, block_size=16, exact_block=48, tile=64,
        sources=((0, None),), group_heads=(2, 0), discarded=(4, 1, 3), bias=True, rotary_dim=None,
        interleaved=False, dtype=torch.float32, query_lens=(1, 33, 7, 3),
        context_lens=(130, 47, 15, 0), compressed=(1, 1, 0, 1),
    ):  # fmt: skip
        self.kit, self.rotation_block, self.dtype = kit, rotation_block, dtype
        self.head_dim, self.exact_block, self.tile = head_dim, exact_block, tile
        num_layers = 1 + max(layer for layer, _ in sources)
        self.batch = batch = kit.PagedBatch(
            list(query_lens), list(context_lens), 2, head_dim, block_size,
            num_layers=num_layers, dtype=dtype, seed=rotation_block,
        )  # fmt: skip
        self.sources = [(layer, [0, 1] if heads is None else heads) for layer, heads in sources]
        self.source = FeatureSource(
            [batch.caches[layer] for layer, _ in sources],
            [None if heads is None else torch.tensor(heads) for _, heads in sources],
        )
        self.rotary = kit.make_rotary(head_dim, rotary_dim, interleaved)
        self.compressed = torch.tensor(compressed, dtype=torch.int32)
        self.group_heads = torch.tensor(group_heads, dtype=torch.int32)
        self.discarded = torch.tensor(discarded, dtype=torch.int32)
        width, count = self.source.width, len(group_heads)
        shape = (count, width, head_dim)
        self.maps = [batch.randn(*shape) / width**0.5 for _ in range(2)] + [None, None]
        if bias:
            self.maps[2:] = batch.randn(count, head_dim), batch.randn(count, head_dim)
        self.exact = batch.random_pages(exact_block).to(torch.uint8)
        self._residual_pages()
        # This step's keys and values are slices of wider rows, as a model's are.
        num_heads, total = 1 + max(discarded), batch.num_tokens + 2
        self.fresh = batch.randn(total, 2 * num_heads, head_dim)
        self.fresh[batch.num_tokens :] = float("nan")
        starts = [
            (request, start)
            for request, seq_len in enumerate(batch.seq_lens.tolist())
            for start in range(0, seq_len, tile)
        ]
        order = torch.randperm(len(starts), generator=batch.generator).tolist()
        starts = [(-1, 0), *(starts[i] for i in order), (-1, 7 * tile)]
        self.tile_request, self.tile_start = torch.tensor(starts, dtype=torch.int32).T.contiguous()

    def _residual_pages(self):
        """Exact pages hold random slots; all others, and slots beyond the context, are NaN."""
        batch, count = self.batch, len(self.discarded)
        num_requests, num_pages = self.exact.shape
        num_blocks = num_requests * num_pages + 1
        ids = torch.randperm(num_blocks - 1, generator=batch.generator) + 1
        self.residual_table = ids.view(num_requests, num_pages).int()
        self.stored = []
        shape = (num_blocks, count, self.exact_block, 2 * self.head_dim)
        self.residual = poison(*shape, dtype=self.dtype)
        for request, context_len in enumerate(batch.context_lens.tolist()):
            self.stored.append(batch.randn(context_len, count, 2 * self.head_dim))
            for position in range(context_len):
                page = position // self.exact_block
                if self.exact[request, page]:
                    block = self.residual_table[request, page]
                    slot = self.stored[-1][position].to(self.dtype)
                    self.residual[block, :, position % self.exact_block] = slot

    def positions(self):
        """(tile, request, slice of its rows, positions) of every tile that is filled."""
        for tile, request in enumerate(self.tile_request.tolist()):
            if request >= 0 and self.compressed[request]:
                start = int(self.tile_start[tile])
                stop = min(start + self.tile, int(self.batch.seq_lens[request]))
                yield tile, request, slice(stop - start), torch.arange(start, stop)

    def dense(self, dtype=torch.float64):
        """The workspace [num_tiles, TILE, nd, 2, d] float64; products in `dtype`."""
        count = len(self.discarded)
        shape = (len(self.tile_request), self.tile, count, 2, self.head_dim)
        workspace = poison(*shape, dtype=torch.float64)
        places = self.group_heads.long()
        for tile, request, rows, position in self.positions():
            workspace[tile][:, places] = 0
            workspace[tile, rows][:, places] = self._filled(request, position, dtype).double()
        return workspace

    def _filled(self, request, position, dtype):
        batch, places = self.batch, self.group_heads.long()
        context_len = int(batch.context_lens[request])
        x = [
            torch.cat([kv[request][layer][position][:, heads] for layer, heads in self.sources], 1)
            for kv in (batch.key, batch.value)
        ]
        t0 = position - position % (self.rotation_block or 1 << 30)
        maps = [None if m is None else m.to(dtype) for m in self.maps]
        turned = self.rotate(x[0].to(dtype), -t0).flatten(1)
        key = torch.einsum("tf,jfd->tjd", turned, maps[0])
        value = torch.einsum("tf,jfd->tjd", x[1].to(dtype).flatten(1), maps[1])
        if maps[2] is not None:
            key, value = key + maps[2], value + maps[3]
        filled = torch.stack((self.rotate(key, t0), value), 2)
        exact = self.exact[request, (position // self.exact_block)].bool()
        stored, fresh = position[position < context_len], position[position >= context_len]
        slots = self.stored[request][stored][:, places].unflatten(-1, (2, self.head_dim)).to(dtype)
        num_stored = len(stored)
        is_exact = exact[:num_stored, None, None, None]
        filled[:num_stored] = torch.where(is_exact, slots, filled[:num_stored])
        token = int(batch.query_start_loc[request]) + fresh - context_len
        heads = self.discarded.long()[places]
        offset = self.fresh.shape[1] // 2
        both = torch.stack((self.fresh[token][:, heads], self.fresh[token][:, heads + offset]), 2)
        filled[num_stored:] = both.to(dtype)
        return filled

    def rotate(self, x, positions):
        return self.kit.complex_rotate(self.rotary, x, positions).to(x.dtype)

    def arguments(self):
        batch = self.batch
        maps = EchoMaps(*(None if m is None else m.to(self.dtype) for m in self.maps))
        count = self.fresh.shape[1] // 2
        fresh = self.fresh.to(self.dtype)
        return {
            "tile_request": self.tile_request,
            "tile_start": self.tile_start,
            "features": self.source,
            "maps": maps,
            "group_heads": self.group_heads,
            "residual_cache": self.residual,
            "residual_table": self.residual_table,
            "exact": self.exact,
            "compressed": self.compressed,
            "retained_table": batch.block_table,
            "seq_lens": batch.seq_lens,
            "context_lens": batch.context_lens,
            "query_start_loc": batch.query_start_loc,
            "key": fresh[:, :count],
            "value": fresh[:, count:],
            "discarded": self.discarded,
            "rotation": self.rotary,
            "rotation_block": self.rotation_block,
        }

    def workspace(self):
        shape = (len(self.tile_request), self.tile, len(self.discarded), 2, self.head_dim)
        return poison(*shape, dtype=self.dtype)

    def run_reference(self, **changes):
        workspace = self.workspace()
        reference(workspace, **(self.arguments() | changes))
        return workspace

    def run(self, device, tiles=None, **changes):
        from echokv_kernels.gpu.features import PagedFeatures
        from echokv_kernels.gpu.rebuild import materialize
        from echokv_kernels.gpu.rotation import RotationTable

        arguments = self.arguments() | changes
        source = arguments["features"]
        pool = torch.as_strided(
            source.caches[0], (source.caches[0].untyped_storage().nbytes() // self.dtype.itemsize,),
            (1,), 0,
        ).to(device)  # fmt: skip
        caches = [
            torch.as_strided(pool, cache.shape, cache.stride(), cache.storage_offset())
            for cache in source.caches
        ]
        arguments["features"] = PagedFeatures.of(FeatureSource(caches, source.heads))
        rotary = arguments["rotation"].to(device)
        arguments["rotation"] = RotationTable.build(rotary, self.batch.max_len)
        for name, argument in arguments.items():
            if isinstance(argument, (torch.Tensor, EchoMaps)):
                arguments[name] = argument.to(device)
        workspace = self.workspace().to(device)
        materialize(workspace, **arguments, tiles=tiles)
        return workspace.cpu()


def assert_filled(got, want, atol=2e-5):
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=1e-5, equal_nan=True)


VARIANTS = {
    "plain": {},
    "layers": {
        "sources": ((1, [1]), (0, None)), "head_dim": 64, "block_size": 80,
        "group_heads": (0, 1, 2),
    },
    "partial": {"head_dim": 96, "rotary_dim": 24, "block_size": 48, "exact_block": 16, "tile": 128},
    "wide": {"head_dim": 96, "group_heads": (1,), "discarded": (0, 2), "bias": False},
    "interleaved": {"interleaved": True, "head_dim": 64, "tile": 96},
    "partly interleaved": {"interleaved": True, "head_dim": 32, "rotary_dim": 16, "tile": 16},
}  # fmt: skip


@pytest.mark.parametrize("rotation_block", ROTATION_BLOCKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_matches_dense(kit, variant, rotation_block):
    scene = Scene(kit, rotation_block, **VARIANTS[variant])
    assert_filled(scene.run_reference(), scene.dense())


@pytest.mark.parametrize("rotation_block", ROTATION_BLOCKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_dense(kit, device, variant, rotation_block):
    scene = Scene(kit, rotation_block, **VARIANTS[variant])
    assert_filled(scene.run(device), scene.dense())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("rotation_block", [48, 128])
def test_long_heads(kit, device, head_dim, interleaved, rotation_block):
    scene = Scene(
        kit, rotation_block, head_dim=head_dim, interleaved=interleaved, tile=128,
        query_lens=(1, 33), context_lens=(127, 47), compressed=(1, 1),
    )  # fmt: skip
    assert_filled(scene.run(device), scene.dense())


@pytest.mark.parametrize("rotation_block", [32, 128, 17])
@pytest.mark.parametrize(("rows", "heads", "step"), [(64, 2, 32), (32, 4, 64), (16, 2, 64)])
def test_any_tiles(kit, device, rows, heads, step, rotation_block):
    from echokv_kernels.gpu.launch import RebuildTiles

    scene = Scene(
        kit, rotation_block, head_dim=64, group_heads=(1, 3, 0), discarded=(0, 1, 2, 5),
        query_lens=(1, 20), context_lens=(97, 20), compressed=(1, 1),
    )  # fmt: skip
    assert_filled(scene.run(device, RebuildTiles(rows, heads, step)), scene.dense())


@pytest.mark.parametrize("length", [1, 15, 17, 63, 64, 65, 129])
def test_odd_lengths(kit, device, length):
    scene = Scene(kit, query_lens=[1, 5], context_lens=[length, length - 1], compressed=(1, 1))
    scene.exact[:] = 0
    assert_filled(scene.run(device), scene.dense())


def test_long_positions(kit, device):
    """Positions near 40,000: t0 is large, and rotations must still cancel."""
    scene = Scene(kit, 1, query_lens=[1], context_lens=[40_001], compressed=(1,))
    scene.exact[:] = 0
    scene.tile_request, scene.tile_start = torch.tensor([[0, 0], [0, 39_936]], dtype=torch.int32)
    assert_filled(scene.run(device), scene.dense(), atol=5e-5)


@pytest.mark.parametrize("rotation_block", [0, 64])
def test_poison_outside_the_wanted_tokens(kit, device, rotation_block):
    scene = Scene(kit, rotation_block, sources=((0, None), (1, [1])))
    want = scene.dense()
    for request, context_len in enumerate(scene.batch.context_lens.tolist()):
        token = torch.arange(int(scene.batch.seq_lens[request]))
        unwanted = (token >= context_len) | scene.exact[request, token // 48].bool()
        token = token[unwanted | (scene.compressed[request] == 0)]
        page = scene.batch.block_table[request, token // 16]
        for cache in scene.batch.caches:
            cache[page, :, token % 16] = float("nan")
    assert_filled(scene.run(device), want)


def test_only_copies_read_no_feature(kit, device):
    scene = Scene(kit)
    scene.exact[:] = 1
    for request, context_len in enumerate(scene.batch.context_lens.tolist()):
        for position in range(context_len):
            block = scene.residual_table[request, position // 48]
            slot = scene.stored[request][position].to(scene.dtype)
            scene.residual[block, :, position % 48] = slot
    want = scene.dense()
    for cache in scene.batch.caches:
        cache[:] = float("nan")
    for got in (scene.run(device), scene.run_reference()):
        torch.testing.assert_close(got.double(), want.float().double(), equal_nan=True)


def test_tokens_beyond_the_mask_are_rebuilt(kit, device):
    scene = Scene(kit)
    narrow = scene.exact[:, :2].contiguous()
    scene.exact[:, 2:] = 0
    want = scene.dense()
    assert_filled(scene.run(device, exact=narrow), want)
    assert_filled(scene.run_reference(exact=narrow), want)


def test_uncompressed_requests_are_left_alone(kit, device):
    scene = Scene(kit, compressed=(0,) * 4)
    assert bool(scene.run(device).isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotation_block", [0, 1, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precision_is_as_good_as_dense(kit, device, rotation_block, interleaved, dtype):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers in tl.dot")
    scene = Scene(kit, rotation_block, head_dim=64, dtype=dtype, interleaved=interleaved)
    exact, plain, got = scene.dense(), scene.dense(dtype), scene.run(device).double()
    assert torch.equal(got.isnan(), exact.isnan())
    for kv in range(2):
        mine, theirs = ((x - exact)[..., kv, :].nan_to_num().abs().max() for x in (got, plain))
        assert mine <= 2 * theirs, f"error {mine:.2e}, plain PyTorch has {theirs:.2e}"


def test_mismatches_are_named(kit, device):
    scene = Scene(kit)
    narrow = FeatureSource([scene.batch.caches[0]], [torch.tensor([0])])
    with pytest.raises(ValueError, match="1 source heads of 32"):
        scene.run(device, features=narrow)
    with pytest.raises(ValueError, match="1 source heads of 32"):
        scene.run_reference(features=narrow)
    with pytest.raises(ValueError, match="rotation_block is -1"):
        scene.run(device, rotation_block=-1)
    with pytest.raises(ValueError, match="cannot hold the 2 heads"):
        scene.run(device, residual_cache=scene.residual[:, :2])
    with pytest.raises(ValueError, match=r"convert the maps"):
        scene.run(device, maps=scene.arguments()["maps"].to(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="key map with strides"):
        maps = scene.arguments()["maps"]
        strided = EchoMaps(maps.key.transpose(1, 2).contiguous().transpose(1, 2), maps.value)
        scene.run(device, maps=strided)
    scene.tile = 24
    with pytest.raises(ValueError, match="tiles of 24 positions"):
        scene.run(device)
