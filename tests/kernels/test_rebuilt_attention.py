"""Rebuilt and absorbed attention against keys and values rebuilt token by token in float64."""

import pytest
import torch

from echokv_kernels import decode, reconstruct
from echokv_kernels.attention import paged_attention
from echokv_kernels.decode import absorbed_decode
from echokv_kernels.reconstruct import EchoMaps, FeatureSource, rebuild, rebuilt_attention
from echokv_kernels.softmax import merge_attention
from echokv_kernels.tiles import QueryTiles, split_queries

ROTATION_BLOCKS = [0, 1, 16, 64, 256]


class Scene:
    """A batch, two discarded heads (by default) and maps from source heads of several layers."""

    def __init__(
        self, kit, rotation_block=64, group=2, head_dim=32, block_size=16, exact_block=48,
        sources=((0, None),), num_discarded=2, bias=True, rotary_dim=None, interleaved=False,
        dtype=torch.float32, query_lens=(1, 33, 1, 70, 1, 1), context_lens=None, num_heads=3,
        position_shift=0,
    ):  # fmt: skip
        if context_lens is None:
            context_lens = [500, 63, block_size - 1, 700, block_size + 1, 0]
        self.kit, self.rotation_block, self.num_discarded = kit, rotation_block, num_discarded
        self.batch = kit.PagedBatch(
            list(query_lens), list(context_lens), num_heads, head_dim, block_size,
            num_layers=1 + max(layer for layer, _ in sources), dtype=dtype, seed=rotation_block,
        )  # fmt: skip
        self.sources = [
            (layer, list(range(num_heads)) if heads is None else heads) for layer, heads in sources
        ]
        self.source = FeatureSource(
            [self.batch.caches[layer] for layer, _ in sources],
            [None if heads is None else torch.tensor(heads) for _, heads in sources],
        )
        self.rotation = kit.make_rotary(head_dim, rotary_dim, interleaved)
        width = head_dim * sum(len(heads) for _, heads in self.sources)
        assert width == self.source.width
        randn, shape = self.batch.randn, (num_discarded, width, head_dim)
        self.maps = [randn(*shape) / width**0.5, randn(*shape) / width**0.5, None, None]
        if bias:
            self.maps[2:] = randn(num_discarded, head_dim), randn(num_discarded, head_dim)
        self.echo_maps = EchoMaps(*(m if m is None else m.to(dtype) for m in self.maps))
        self.query = self.batch.queries(num_discarded * group)
        self.exact_block = exact_block
        self.exact = self.batch.random_pages(exact_block)
        self.tiles = split_queries(self.batch.query_start_loc, self.batch.seq_lens)

    def run(self, function, **changes):
        batch = self.batch
        arguments = {
            "query": self.query.to(batch.dtype),
            "source": self.source,
            "maps": self.echo_maps,
            "block_table": batch.block_table,
            "tiles": self.tiles,
            "visible_len": batch.context_lens,
            "exact_mask": self.exact,
            "exact_block_size": self.exact_block,
            "rotation": self.rotation,
            "rotation_block": self.rotation_block,
            "scale": batch.scale,
            "max_len": batch.max_len,
        }
        return function(**(arguments | changes))

    def rebuild_dense(self, dtype=torch.float64):
        """Keys and values of the discarded heads per request [t, nd, d], in `dtype`."""
        keys, values = [], []
        maps = [None if m is None else m.to(dtype) for m in self.maps]
        for request in range(len(self.batch.query_lens)):
            token = torch.arange(int(self.batch.seq_lens[request]))
            t0 = token - token % (self.rotation_block or len(token))
            x_key, x_value = (
                torch.cat([kv[request][layer][:, heads] for layer, heads in self.sources], 1)
                for kv in (self.batch.key, self.batch.value)
            )
            x_key = self.rotate(x_key.to(dtype), -t0).flatten(1)
            key = torch.einsum("tf,jfd->tjd", x_key, maps[0])
            value = torch.einsum("tf,jfd->tjd", x_value.to(dtype).flatten(1), maps[1])
            if maps[2] is not None:
                key, value = key + maps[2], value + maps[3]
            keys.append(self.rotate(key, t0))
            values.append(value)
        return keys, values

    def rotate(self, x, positions):
        return self.kit.complex_rotate(self.rotation, x, positions).to(x.dtype)

    def visible(self, request, position, token):
        exact = self.exact[request, token // self.exact_block]
        return (token < self.batch.context_lens[request]) & ~exact

    def dense(self, dtype=torch.float64):
        keys, values = self.rebuild_dense(dtype)
        return self.batch.dense(self.query, self.visible, keys, values, dtype)

    def functions(self):
        return [rebuilt_attention] + [absorbed_decode] * (self.rotation_block != 1)


VARIANTS = {
    "plain": {},
    "one of many": {"group": 1, "num_discarded": 1, "sources": ((0, [2]),)},
    "wide group": {"group": 16, "head_dim": 64, "block_size": 48, "exact_block": 80},
    "layers": {"sources": ((0, None), (2, [2, 0])), "head_dim": 64, "block_size": 80},
    "partial": {"head_dim": 96, "rotary_dim": 24, "block_size": 112, "exact_block": 16},
    "interleaved": {"interleaved": True, "group": 4, "head_dim": 128, "bias": False},
}


@pytest.mark.parametrize("rotation_block", ROTATION_BLOCKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_dense(kit, variant, rotation_block):
    scene = Scene(kit, rotation_block, **VARIANTS[variant])
    want = scene.dense()
    for function in scene.functions():
        kit.assert_same(scene.run(function), want, atol=5e-5)


@pytest.mark.parametrize("rotation_block", [48, 112, 768, 4096])
def test_blocks_unrelated_to_pages_and_spans(kit, rotation_block):
    scene = Scene(kit, rotation_block, context_lens=[1700, 63, 15, 700, 17, 0])
    want = scene.dense()
    for function in scene.functions():
        kit.assert_same(scene.run(function), want, atol=5e-5)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 500, 512, 513])
def test_odd_lengths(kit, length):
    scene = Scene(kit, query_lens=[1, 5], context_lens=[length, length - 1])
    scene.exact[:] = False
    want = scene.dense()
    for function in scene.functions():
        kit.assert_same(scene.run(function), want, atol=5e-5)


def test_long_positions(kit):
    """Positions near 40,000: t0 is large, and rotations must still cancel."""
    scene = Scene(kit, 256, query_lens=[1, 3], context_lens=[40_001, 300], num_heads=1)
    scene.exact[0, :800] = True  # all but the last few spans are exact, so dense is affordable
    want = scene.dense()
    for function in scene.functions():
        kit.assert_same(scene.run(function), want, atol=5e-5)


@pytest.mark.parametrize("query_tile", [1, 7, 64])
def test_any_tile_shape(kit, query_tile):
    scene = Scene(kit, 16, sources=((0, None), (1, [1])))
    scene.tiles = [QueryTiles.build(scene.batch.query_start_loc, scene.batch.seq_lens, query_tile)]
    want = scene.dense()
    for function in scene.functions():
        kit.assert_same(scene.run(function), want, atol=5e-5)


def test_few_absorbed_queries_per_span(kit, monkeypatch):
    monkeypatch.setattr(decode, "_ABSORBED_SIZE", 1)
    scene = Scene(kit, 16)
    kit.assert_same(scene.run(absorbed_decode), scene.dense(), atol=5e-5)


def test_poison_outside_the_wanted_tokens(kit):
    scene = Scene(kit, 64, sources=((0, None), (1, [1])))
    want = scene.dense()
    for request in range(len(scene.batch.query_lens)):
        token = torch.arange(int(scene.batch.seq_lens[request]))
        unwanted = token[~scene.visible(request, None, token)]
        page = scene.batch.block_table[request, unwanted // 16]
        for cache in scene.batch.caches:
            cache[page, :, unwanted % 16] = float("nan")
    for function in scene.functions():
        kit.assert_same(scene.run(function), want, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotation_block", ROTATION_BLOCKS)
def test_half_precision_is_as_good_as_dense(kit, rotation_block, dtype):
    scene = Scene(kit, rotation_block, head_dim=64, dtype=dtype)
    plain, exact = scene.dense(dtype), scene.dense()
    for function in scene.functions():
        kit.assert_as_precise(scene.run(function), plain, exact)


def test_rebuild_gives_keys_and_values_in_place(kit):
    scene = Scene(kit, 64, rotary_dim=16, context_lens=[500, 63, 15, 700, 17, 1])
    keys, values = scene.rebuild_dense()
    start, stop = 37, 501
    features = scene.source.gather(scene.batch.block_table[[0, 3]], start, stop)
    positions = torch.arange(start, stop)
    got = rebuild(features, scene.echo_maps, positions, scene.rotation, 64)
    for row, request in enumerate((0, 3)):
        for mine, theirs in ((got[0], keys), (got[1], values)):
            want = theirs[request][start:stop].transpose(0, 1)
            torch.testing.assert_close(mine[row].double(), want, atol=2e-5, rtol=1e-5)


def test_nothing_to_rebuild_reads_nothing(kit, monkeypatch):
    scene = Scene(kit)
    scene.exact[:] = True

    def refuse(*arguments):
        raise AssertionError("read pages although everything is exact")

    monkeypatch.setattr(reconstruct, "gather_pages", refuse)
    for function in scene.functions():
        out, lse = scene.run(function)
        assert bool((out == 0).all()) and bool((lse == float("-inf")).all())


def test_queries_before_the_first_rebuilt_token_see_nothing(kit):
    """Causal: in one row, some queries see tokens and some none; a bias must not fill the gap."""
    scene = Scene(kit, 64, query_lens=[70, 1], context_lens=[0, 90])
    scene.exact[:] = False
    scene.exact[0, 0] = True

    def visible(request, position, token):
        exact = scene.exact[request, token // scene.exact_block]
        return (token <= position[:, None]) & ~exact

    want = scene.batch.dense(scene.query, visible, *scene.rebuild_dense())
    assert bool((want[1][:48] == float("-inf")).all()) and bool(want[1][48:71].isfinite().all())
    for function in scene.functions():
        kit.assert_same(scene.run(function, visible_len="causal"), want, atol=5e-5)


def test_tokens_beyond_the_mask_are_rebuilt(kit):
    scene = Scene(kit)
    narrow = scene.exact[:, :3].clone()
    scene.exact[:, 3:] = False
    want = scene.dense()
    for function in scene.functions():
        kit.assert_same(scene.run(function, exact_mask=narrow), want, atol=5e-5)


def test_exact_and_rebuilt_parts_make_the_whole(kit):
    """Identity maps: rebuilt keys equal the source's, so both parts merge to plain attention."""
    scene = Scene(kit, 64, num_discarded=1, sources=((0, [1]),), bias=False, exact_block=48)
    eye = torch.eye(32)[None]
    batch = scene.batch
    paged = paged_attention(
        scene.query.float().repeat(1, 3, 1), batch.caches[0], batch.block_table, scene.tiles,
        batch.context_lens, batch.scale, page_mask=scene.exact, page_mask_block_size=48,
        max_len=batch.max_len,
    )  # fmt: skip
    exact_part = paged[0][:, 2:4], paged[1][:, 2:4]
    want = batch.dense(
        scene.query, lambda r, p, t: t < batch.context_lens[r],
        [key[0][:, 1:2] for key in batch.key], [value[0][:, 1:2] for value in batch.value],
    )  # fmt: skip
    for function in scene.functions():
        rebuilt = scene.run(function, maps=EchoMaps(eye, eye))
        kit.assert_same(merge_attention([exact_part, rebuilt]), want, atol=5e-5)


def test_tensors_follow_their_inputs(kit):
    """A foreign default device stands in for an accelerator: nothing may be created on it."""
    scene = Scene(kit)
    want = scene.dense()
    with torch.device("meta"):
        scene.tiles = split_queries(scene.batch.query_start_loc, scene.batch.seq_lens)
        got = [scene.run(function) for function in scene.functions()]
        paged = paged_attention(
            scene.query.float().repeat(1, 3, 1), scene.batch.caches[0], scene.batch.block_table,
            scene.tiles, "causal", 1.0, page_mask=scene.exact, page_mask_block_size=48,
            max_len=scene.batch.max_len,
        )  # fmt: skip
    assert paged[0].device.type == "cpu"
    for result in got:
        kit.assert_same(result, want, atol=5e-5)


def test_mismatches_are_named(kit):
    scene = Scene(kit)
    narrow = FeatureSource([scene.batch.caches[0]], [torch.tensor([0])])
    for function in scene.functions():
        with pytest.raises(ValueError, match="features of 32 elements"):
            scene.run(function, source=narrow)
        with pytest.raises(ValueError, match="heads of 64 elements"):
            scene.run(function, rotation=kit.make_rotary(64))
        with pytest.raises(ValueError, match="rotation_block is -1"):
            scene.run(function, rotation_block=-1)
    with pytest.raises(ValueError, match="cannot be absorbed"):
        scene.run(absorbed_decode, rotation_block=1)
    with pytest.raises(ValueError, match="0 head lists"):
        FeatureSource([scene.batch.caches[0]], [])
    with pytest.raises(ValueError, match="one page shape"):
        FeatureSource([torch.zeros(2, 1, 16, 64), torch.zeros(2, 1, 48, 64)], [None, None])
    with pytest.raises(ValueError, match="key_bias has shape"):
        EchoMaps(torch.zeros(2, 32, 32), torch.zeros(2, 32, 32), torch.zeros(32))
