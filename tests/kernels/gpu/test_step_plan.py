"""Step plans: the reference against a plain loop, the kernels against the reference."""

from dataclasses import fields

import pytest
import torch

from echokv_kernels.step_plan import Shares, StepKind, StepPlan
from echokv_kernels.step_plan import plan_step as plan_reference

GARBAGE = 1 << 29  # an address that no kernel survives
POISON = 0x55
SIZES = [(16, 16), (48, 80), (80, 48), (16, 48)]
SHARES = {"num_shares": 7, "align": 16, "min_len": 32, "request_cost": 0, "rotation_block": 64}


class Batch:
    """Requests with scattered pages, garbage beyond their lengths, stale and null D pages."""

    def __init__(self, query_lens, seq_lens, sizes, device, seed=0, lost=0.4, extra=3):
        self.sizes, self.device = sizes, device
        generator = torch.Generator().manual_seed(seed)
        n = len(query_lens)
        pages = [[-(-length // size) for length in seq_lens] for size in sizes]
        num_blocks = sum(map(sum, pages)) + 2
        ids = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        self.owner = torch.randint(-1, 1000, (num_blocks,), generator=generator)
        self.owner[0] = 0  # would match a row of zeros if null pages counted
        self.tables = []
        for count in pages:
            # A view of a wider table, as the engine's persistent ones are.
            table = torch.full((n + 1, max(count) + extra + 5), GARBAGE, dtype=torch.int32)
            for request in range(n):
                for column in range(count[request]):
                    table[request, column] = ids.pop()
            self.tables.append(table)
        for request in range(n):
            for column in range(pages[1][request]):
                dice = float(torch.rand((), generator=generator))
                block = int(self.tables[1][request, column])
                if dice >= lost:
                    self.owner[block] = self.tag(request, column)
                elif dice < lost / 2:
                    self.tables[1][request, column] = 0
        self.query_lens, self.seq_lens = query_lens, seq_lens
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        self.query_start_loc = torch.cat((starts, torch.full((2,), GARBAGE).int()))
        self.lengths = torch.tensor([*seq_lens, GARBAGE], dtype=torch.int32)

    def tag(self, request, column):
        retained_size, residual_size = self.sizes
        token = column * residual_size
        block = int(self.tables[0][request, token // retained_size])
        return block * retained_size + token % retained_size

    def lose(self, request, column):
        self.tables[1][request, column] = 0

    def args(self):
        retained, residual = (table[:, :-5].to(self.device) for table in self.tables)
        tensors = self.owner, retained, residual, self.query_start_loc, self.lengths
        return *(tensor.to(self.device) for tensor in tensors), len(self.query_lens)

    def plan(self, paired=True, spare=2):
        max_len = max(16, *self.seq_lens) + 40
        plan = StepPlan.allocate(
            len(self.query_lens) + spare, max_len, *self.sizes, paired, self.device
        )
        for field in fields(plan):
            buffer = getattr(plan, field.name)
            if isinstance(buffer, torch.Tensor):
                buffer.fill_(POISON)
        return plan

    def expected(self, plan, shares, kind):
        """The specification, request by request and page by page, into a poisoned plan."""
        retained_size, residual_size = self.sizes
        totals = []
        for request, query_len in enumerate(self.query_lens):
            seq_len = self.seq_lens[request] if query_len else 0
            rows = plan.row_of(request, 0), plan.row_of(request, 1)
            for column in range(-(-seq_len // retained_size)):
                plan.tables[rows[0], column] = self.tables[0][request, column]
            readable, missing, readable_len = [], 0, 0
            for column in range(-(-seq_len // residual_size)):
                block = int(self.tables[1][request, column])
                exact = block != 0 and int(self.owner[block]) == self.tag(request, column)
                plan.exact[request, column] = exact
                missing += not exact
                if exact or query_len != 1:
                    readable.append(block)
                    readable_len += min(residual_size, seq_len - column * residual_size)
            for column, block in enumerate(readable):
                plan.tables[rows[1], column] = block
            decode = query_len == 1
            if kind == StepKind.FULL and missing:
                plan.broken[0] = 1
            missing = missing or int(kind == StepKind.COMPRESSED and decode)
            plan.compressed[request] = int(missing > 0)
            plan.lens[rows[0]] = 0 if decode and missing else seq_len
            plan.lens[rows[1]] = readable_len if decode or not missing else 0
            totals.append(seq_len if decode and missing else 0)
        end = lines = 0
        for request, total in enumerate(totals):
            while total % shares.align:
                total += 1
            end += total + (shares.gap if total else 0)
            plan.token_end[request] = end
            if shares.rotation_block != 1:
                block = shares.rotation_block or 1 << 30
                lines += -(-totals[request] // block)
            plan.line_end[request] = lines
        share_len = max(shares.min_len, -(-end // shares.num_shares))
        share_len = -(-share_len // shares.align) * shares.align
        plan.share_len[0] = share_len
        for request, total in enumerate(totals):
            begin = int(plan.token_end[request - 1]) if request else 0
            taken = {(begin + token) // share_len for token in range(total)}
            first = min(taken, default=0) + request
            plan.items[request, 0], plan.items[request, 1] = first, first + len(taken)
            assert bool(taken) == (total > 0)


def assert_same_plans(plan, other):
    for field in fields(plan):
        one, two = getattr(plan, field.name), getattr(other, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two), f"{field.name}:\n{one}\n{two}"


def check(batch, paired=True, kind=StepKind.MIXED, **shares):
    """Reference, kernels and loop must leave the same bytes, poison included."""
    from echokv_kernels.gpu.step_plan import plan_step

    shares = Shares(**SHARES | shares)
    plans = [batch.plan(paired) for _ in range(3)]
    batch.expected(plans[0], shares, kind)
    plan_reference(plans[1], *batch.args(), shares, kind)
    assert_same_plans(plans[1], plans[0])
    plan_step(plans[2], *batch.args(), shares, kind)
    if batch.device.type == "cuda":
        torch.cuda.synchronize()  # the host reads `broken`, which the device writes
    assert_same_plans(plans[2], plans[0])
    return plans[2]


@pytest.fixture
def narrow_rounds(monkeypatch):
    """Few columns per round, so that short requests take several."""
    from echokv_kernels.gpu import step_plan

    monkeypatch.setattr(step_plan, "PAGE_BLOCK", 32)
    monkeypatch.setattr(step_plan, "PAGE_WARPS", 1)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_decodes_chunks_and_padding_side_by_side(device, sizes, paired):
    query_lens = [1, 1, 1, 63, 17, 1, 0, 0]
    seq_lens = [500, 1, 161, 63, 400, 80, 0, 33]
    check(Batch(query_lens, seq_lens, sizes, device, seed=1), paired)
    check(Batch(query_lens, seq_lens, sizes, device, seed=2, lost=0.0), paired)


@pytest.mark.parametrize("lost", [0.0, 0.4])
@pytest.mark.parametrize("kind", StepKind)
def test_kinds_of_steps(device, kind, lost):
    batch = Batch(
        [1, 1, 1, 63, 1, 0], [500, 1, 161, 63, 80, 33], (16, 48), device, seed=3, lost=lost
    )
    plan = check(batch, kind=kind)
    assert plan.broken.tolist() == [1 if kind is StepKind.FULL and lost else POISON]
    if kind is StepKind.COMPRESSED:
        assert plan.compressed[[0, 1, 2, 4]].tolist() == [1] * 4
        assert plan.compressed[5] == 0, "padding"


@pytest.mark.parametrize("sizes", SIZES)
def test_random_batches(device, sizes, narrow_rounds):
    dice = torch.Generator().manual_seed(7)
    for seed in range(6):
        n = int(torch.randint(1, 7, (), generator=dice))
        seq_lens = torch.randint(1, 900, (n,), generator=dice).tolist()
        pick = torch.randint(0, 4, (n,), generator=dice).tolist()
        query_lens = [
            (0, 1, 1, min(5, length))[kind] for kind, length in zip(pick, seq_lens, strict=True)
        ]
        lost = (0.0, 0.02, 0.5, 1.0)[seed % 4]
        batch = Batch(query_lens, seq_lens, sizes, device, seed, lost, extra=seed % 3)
        rotation_block = (0, 1, 16, 48, 64, 256)[seed]
        check(batch, bool(seed % 2), num_shares=1 + 3 * seed, rotation_block=rotation_block)


def test_compaction_keeps_the_order_over_many_rounds(device, narrow_rounds):
    batch = Batch([1], [16 * 70], (16, 16), device, lost=0.0)
    for column in (0, 31, 32, 33, 40, 69):
        batch.lose(0, column)
    plan = check(batch)
    left = [c for c in range(70) if c not in (0, 31, 32, 33, 40, 69)]
    row = plan.tables[plan.row_of(0, 1)].tolist()
    assert row[:64] == batch.tables[1][0, left].tolist()
    assert row[64:70] == [POISON] * 6
    assert plan.lens[plan.row_of(0, 1)] == 64 * 16 and plan.lens[plan.row_of(0, 0)] == 0


@pytest.mark.parametrize("query_len", [1, 20])
def test_long_requests_with_the_real_tile(device, query_len):
    from echokv_kernels.gpu.step_plan import PAGE_BLOCK

    batch = Batch([query_len, 1], [16 * PAGE_BLOCK + 163, 16 * PAGE_BLOCK], (16, 16), device)
    check(batch, paired=False)


@pytest.mark.parametrize("tail_lost", [False, True])
@pytest.mark.parametrize("tail_len", [1, 79, 80])
def test_last_page_counts_the_tokens_it_holds(device, tail_len, tail_lost):
    batch = Batch([1, 1], [160 + tail_len, 30], (48, 80), device, lost=0.0)
    batch.lose(0, 1)
    if tail_lost:
        batch.lose(0, 2)
    plan = check(batch)
    lens = [int(plan.lens[plan.row_of(request, 1)]) for request in (0, 1)]
    assert lens == [80 if tail_lost else 80 + tail_len, 30]


def test_null_rows_of_a_warm_up_are_never_exact(device):
    batch = Batch([1, 1, 5], [70, 1, 30], (16, 16), device)
    for table in batch.tables:
        table.zero_()
    plan = check(batch)
    assert plan.compressed[:3].tolist() == [1, 1, 1]
    assert not plan.exact[0, :5].any()


def test_full_requests_have_no_part_in_shares(device):
    batch = Batch([1, 1, 9], [500, 80, 200], (16, 48), device, lost=0.0)
    batch.lose(2, 0)  # a chunk's missing pages are rebuilt, not shared out
    plan = check(batch)
    assert plan.compressed[:3].tolist() == [0, 0, 1]
    assert plan.token_end[:3].tolist() == [0, 0, 0] and plan.share_len.tolist() == [32]
    assert plan.line_end[:3].tolist() == [0, 0, 0]


def test_shares_cover_compressed_decodes(device):
    batch = Batch([1, 3, 1, 1], [500, 64, 33, 257], (16, 16), device, lost=0.0)
    for request in (0, 1, 3):
        batch.lose(request, 0)
    plan = check(batch, num_shares=5, align=48, min_len=16)
    # 528 + 288 tokens over 5 shares are 164, rounded up to 192.
    assert plan.share_len.tolist() == [192]
    assert plan.token_end[:4].tolist() == [528, 528, 528, 816]
    assert plan.line_end[:4].tolist() == [8, 8, 8, 13]
    plan = check(batch, num_shares=1000, align=16, min_len=17, rotation_block=0)
    assert plan.share_len.tolist() == [32] and plan.line_end[:4].tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize("length", [500, 511, 512, 513, 1024, 1030])
def test_shares_are_equal_whatever_the_lengths(device, length):
    batch = Batch([1] * 4, [length, 16, 3 * length, 700], (16, 16), device, lost=0.5)
    for request in range(4):
        batch.lose(request, 0)
    for num_shares in (8, 16, 33):
        plan = check(batch, num_shares=num_shares, align=16, min_len=16)
        end, share_len = int(plan.token_end[3]), int(plan.share_len)
        assert -(-end // share_len) <= num_shares and share_len < end / num_shares + 16


def test_beginning_with_a_request_counts(device):
    """Gaps lie behind requests; a share that holds nothing else is no item."""
    batch = Batch([1, 1, 1], [64, 96, 33], (16, 16), device, lost=0.0)
    for request in range(3):
        batch.lose(request, 0)
    plan = check(batch, num_shares=6, align=16, min_len=16, request_cost=40)
    # Gaps of 48: 112 + 144 + 96 places over 6 shares are 58.7, rounded up to 64.
    assert plan.share_len.tolist() == [64] and plan.token_end[:3].tolist() == [112, 256, 352]
    assert plan.items[:3].tolist() == [[0, 1], [2, 5], [6, 7]]
    check(batch, num_shares=50, align=16, min_len=16, request_cost=1)


def test_plans_of_unpadded_steps_fit_exactly(device):
    batch = Batch([1, 2], [96, 96], (16, 48), device)
    plan = StepPlan.allocate(2, 96, 16, 48, False, device)
    assert plan.exact.shape == (2, 2) and plan.tables.shape == (4, 6)
    assert [plan.row_of(1, part) for part in (0, 1)] == [1, 3]
    from echokv_kernels.gpu.step_plan import plan_step

    plan_step(plan, *batch.args(), Shares(**SHARES))
    other = StepPlan.allocate(2, 96, 16, 48, False, device)
    plan_reference(other, *batch.args(), Shares(**SHARES))
    assert_same_plans(plan, other)


def test_bad_arguments_are_named(device):
    from echokv_kernels.gpu.step_plan import plan_step

    batch = Batch([1, 2], [96, 96], (16, 48), device)
    plan = batch.plan(spare=0)
    owner, retained, residual, starts, lens, n = batch.args()

    def refuse(match, *args):
        for function in (plan_step, plan_reference):
            with pytest.raises(ValueError, match=match):
                function(plan, *args, Shares(**SHARES))

    refuse("num_reqs is 3", owner, retained, residual, starts, lens, 3)
    bad = {"num_shares": 0, "align": 0, "min_len": 0, "request_cost": -1, "rotation_block": -1}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            Shares(**SHARES | {name: value})
    refuse("owner has dtype", owner.int(), retained, residual, starts, lens, n)
    refuse("retained_table has", owner, retained.long(), residual, starts, lens, n)
    refuse("residual_table has", owner, retained, residual[:1], starts, lens, n)
    refuse("query_start_loc has shape", owner, retained, residual, starts[:2], lens, n)
    refuse("seq_lens has dtype", owner, retained, residual, starts, lens.float(), n)
    with pytest.raises(ValueError, match="max_reqs is 0"):
        StepPlan.allocate(0, 96, 16, 48, False, device)


@pytest.mark.gpu
def test_captured_steps_follow_their_inputs(device, kit):
    """One graph with stamps, stores and plan, replayed with other inputs in the same buffers."""
    if device.type != "cuda":
        pytest.skip("captures a CUDA graph")
    from echokv_kernels.gpu.stamp import stamp_owners
    from echokv_kernels.gpu.step_plan import plan_step
    from echokv_kernels.gpu.store import place_heads, store_pages
    from echokv_kernels.store import stamp_owners as stamp_reference
    from echokv_kernels.store import write_pages

    sizes, n, head_dim, num_blocks = (48, 80), 8, 64, 400
    torch.manual_seed(0)
    caches = [
        torch.zeros(num_blocks, 2, size, 2 * head_dim, device=device, dtype=torch.bfloat16)
        for size in sizes
    ]
    copies = [cache.clone() for cache in caches]
    places = place_heads([1, 3], [0, 2], device)
    key, value = (torch.zeros(n, 4, head_dim, device=device).bfloat16() for _ in range(2))
    slots = [torch.full((n,), -1, dtype=torch.int64, device=device) for _ in range(2)]
    owner = torch.full((num_blocks,), -1, dtype=torch.int64, device=device)
    tables = [torch.zeros(n, 24, dtype=torch.int32, device=device) for _ in range(2)]
    starts = torch.arange(n + 1, dtype=torch.int32, device=device)
    lens = torch.zeros(n, dtype=torch.int32, device=device)
    plans = [StepPlan.allocate(n, 1000, *sizes, True, device) for _ in range(2)]

    def step():
        stamp_owners(owner, *slots, *sizes)
        store_pages(key, value, *caches, *slots, places)
        plan_step(plans[0], owner, *tables, starts, lens, n, Shares(**SHARES))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(4):
        batch = Batch([1] * n, torch.randint(1, 900, (n,)).tolist(), sizes, device, seed)
        live = 3 + seed  # the rest is padding
        lens.copy_(batch.lengths[:n])
        lens[live:] = 0
        starts.copy_(torch.arange(n + 1).clamp(max=live))
        owner.fill_(-1)
        owner[: len(batch.owner)] = batch.owner.to(device)
        owner[0] = -1
        last = (lens - 1).long()
        for table, source, size, group in zip(tables, batch.tables, sizes, slots, strict=True):
            table.fill_(GARBAGE)
            table[:, : source.shape[1]] = source[:n, :24].to(device)
            page = table[torch.arange(n, device=device), (last // size).clamp(min=0)]
            group.copy_(torch.where(last >= 0, page.long() * size + last % size, -1))
        key.normal_()
        value.normal_()
        stamped = owner.clone()
        graph.replay()
        stamp_reference(stamped, *slots, *sizes)
        assert torch.equal(owner, stamped)
        plan_reference(plans[1], owner, *tables, starts, lens, n, Shares(**SHARES))
        assert_same_plans(*plans)
        for index, (copy, heads) in enumerate(zip(copies, ([1, 3], [0, 2]), strict=True)):
            heads = torch.tensor(heads, device=device)
            write_pages(key, value, copy, slots[index], heads, index * sizes[1])
            assert torch.equal(copy, caches[index])
