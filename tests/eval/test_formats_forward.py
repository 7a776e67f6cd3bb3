"""Quantised caches and coded residuals in the forward pass, and in the report's bytes."""

import json

import pytest
import rebuilt_forward
import torch
from rebuilt_forward import RebuiltForward
from recording import RecordedRow, RecordedStep

from echokv_vllm.cli import main as cli
from echokv_vllm.eval import EvalOptions
from echokv_vllm.eval.attention import Window
from echokv_vllm.eval.divergence import measure_divergence
from echokv_vllm.eval.footprint import footprint, full_footprint
from echokv_vllm.eval.rebuild import HeadRebuilder, QuantizedCache
from echokv_vllm.quantization import as_cached
from echokv_vllm.rope import rotary_from_config

SINK, RECENT, LENGTH = 3, 8, 40


def min_max(x, bits):
    """The coding of method.md, number by number, for rows of [tokens, head_dim]."""
    rows = []
    for row in x.tolist():
        least = torch.tensor(min(row)).half().item()
        step = torch.tensor((max(row) - least) / (2**bits - 1)).half().item()
        codes = [min(max(round((number - least) / step), 0), 2**bits - 1) for number in row]
        rows.append([least + step * code for code in codes])
    return torch.tensor(rows).view(x.shape)


def rebuilder_of(subject, **formats):
    rotary = rotary_from_config(subject.model.config)
    return HeadRebuilder(subject.checkpoint, rotary, "cpu", **formats)


def logits(subject, rebuilder, ids, monkeypatch):
    monkeypatch.setattr(subject, "rebuilder", rebuilder)
    return subject.compressed_logits(ids[None], torch.zeros(1).long(), Window(SINK, RECENT))[0]


def reference_logits(subject, ids):
    """One token per step; see `test_compressed_forward`."""
    reference = RebuiltForward(subject.model_folder, subject.checkpoint)
    rows = []
    for query in range(len(ids)):
        token = torch.arange(query)
        exact = (token < SINK) | (token > query - RECENT)
        rows.append(
            reference.logits(RecordedStep([RecordedRow("r", query, ids[query : query + 1], exact)]))
        )
    return torch.cat(rows)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (LENGTH,), generator=torch.Generator().manual_seed(31))


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_everything_comes_from_the_quantised_cache(subject, ids, format, monkeypatch):
    """The reference quantises what it stores, so window, retained heads and features follow."""
    found = logits(subject, rebuilder_of(subject, cache_format=format), ids, monkeypatch)
    exact = logits(subject, rebuilder_of(subject), ids, monkeypatch)
    append = rebuilt_forward.TokenStore.append

    def append_quantised(store, layer, context_len, key, value):
        append(store, layer, context_len, as_cached(key, format), as_cached(value, format))

    monkeypatch.setattr(rebuilt_forward.TokenStore, "append", append_quantised)
    expected = reference_logits(subject, ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    assert (found - exact).abs().max() > 0.05, "the format must matter"


@pytest.mark.parametrize("bits", [2, 4])
def test_residuals_correct_what_the_maps_get_wrong(subject, ids, bits, monkeypatch):
    rebuilder = rebuilder_of(subject, residual_bits=bits)
    found = logits(subject, rebuilder, ids, monkeypatch)
    plain = RebuiltForward.rebuilt

    def corrected(self, layer, head, store, num_tokens):
        heads = store.keys[layer][:num_tokens, head], store.values[layer][:num_tokens, head]
        return tuple(
            hat + min_max(exact - hat, bits)
            for hat, exact in zip(plain(self, layer, head, store, num_tokens), heads, strict=True)
        )

    monkeypatch.setattr(RebuiltForward, "rebuilt", corrected)
    expected = reference_logits(subject, ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    uncorrected = logits(subject, rebuilder_of(subject), ids, monkeypatch)
    errors = [(x - full_logits(subject, ids)).abs().mean() for x in (found, uncorrected)]
    assert errors[0] < 0.7 * errors[1]


def full_logits(subject, ids):
    with torch.inference_mode():
        return subject.model(input_ids=ids[None]).logits[0]


def test_residual_is_taken_against_the_exact_head_on_a_quantised_cache(subject):
    """With fp8 features the code still aims at the head as the model computed it."""
    generator = torch.Generator().manual_seed(32)
    written = tuple(torch.randn(1, 4, 12, 32, generator=generator) for _ in range(2))
    stored = tuple(as_cached(x, "fp8") for x in written)
    args = (lambda layer: stored, torch.arange(12), torch.tensor([5]), written)
    hats = rebuilder_of(subject, cache_format="fp8").rebuild(0, *args)
    found = rebuilder_of(subject, cache_format="fp8", residual_bits=2).rebuild(0, *args)
    for hat, coded, exact in zip(hats, found, written, strict=True):
        residual = exact[:, 2:] - hat
        spread = residual.amax(-1) - residual.amin(-1)
        assert ((coded - exact[:, 2:]).abs().amax(-1) <= spread / 6 + 5e-3).all()
        assert (coded - hat).abs().max() > 0.5


def measure(subject, cache):
    sequences = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(33)).int()
    return measure_divergence(
        subject.model, cache, sequences, torch.zeros(4).long(), Window(SINK, RECENT), skip_tokens=16
    ).kl.value


def test_finer_caches_are_closer_to_the_full_one(subject):
    kl = [measure(subject, QuantizedCache(f)) for f in ("auto", "int8", "fp8", "int4", "int2")]
    assert kl[0] == 0 and kl == sorted(kl) and kl[4] > 3 * kl[3] > 0
    echo = measure(subject, rebuilder_of(subject))
    coded = [measure(subject, rebuilder_of(subject, residual_bits=bits)) for bits in (2, 4, 8)]
    assert echo > coded[0] > coded[1] > coded[2] > 0


def test_bytes_of_formats_and_residuals(subject):
    """4 layers, 4 KV heads of 32, half retained, bfloat16: 128 bytes per slot, 16 slots."""
    plain = footprint(subject.checkpoint, 1600, 128, 2)
    fp8 = footprint(subject.checkpoint, 1600, 128, 2, "fp8")
    int4 = footprint(subject.checkpoint, 1600, 128, 2, "int4")
    assert (fp8.full, fp8.retained, fp8.ratio) == (2048, plain.retained / 2, 0.25)
    assert fp8.at_length == plain.at_length / 2 and fp8.maps == plain.maps
    # 32 codes of 4 bits and 4 bytes of scales
    assert int4.retained == 8 * 2 * (16 + 4)
    both = footprint(subject.checkpoint, 1600, 128, 2, "fp8", residual_bits=2)
    assert both.retained == 8 * 2 * 32 + 8 * 2 * (8 + 4)
    assert both.at_length > both.retained
    full = full_footprint(subject.checkpoint.fingerprint, 1601, 2, "int4")
    assert full.retained == 16 * 2 * 20 and full.at_length == full.retained * 1616 / 1601
    assert full.ratio == 20 / 64 and full.maps == 0


def run(subject, *more):
    return cli.main(["eval", str(subject.model_folder), "--quiet", "--device", "cpu", *more])


def test_rows_of_a_quantised_cache_name_it(subject, corpus, tmp_path):
    checkpoint = ("--checkpoint", str(subject.checkpoint_folder))
    common = ("--data", corpus, "--samples", "2", "--length", "64", "--out", str(tmp_path))
    heads = {}
    for name, options in {
        "full cache, int4": ("--kv-cache-dtype", "int4"),
        "local-0.5, fp8": (*checkpoint, "--kv-cache-dtype", "fp8"),
        "local-0.5 + 2-bit residual": (*checkpoint, "--residual-bits", "2"),
    }.items():
        assert run(subject, *common, *options) == 0
        row = json.loads((tmp_path / "eval.json").read_text())["rows"][-1]
        assert (row["plan"], row["measure"]) == (name, "KL(full, echo)") and row["score"]["low"] > 0
        heads[name] = row["ratio"]
    # The tiny model is stored in float32, which vLLM serves in 16 bits: 2 bytes per number.
    assert heads["full cache, int4"] == 20 / 64 and heads["local-0.5, fp8"] == 0.25
    assert heads["local-0.5 + 2-bit residual"] == 0.5 + 0.5 * 12 / 64


def test_contradicting_options_are_refused():
    for options, words in (
        (dict(residual_bits=2, data="x"), "no checkpoint"),
        (dict(residual_bits=3, checkpoint="c", data="x"), "residual_bits=3 is not one of 0, 2"),
        (dict(kv_cache_dtype="fp4", data="x"), "auto, fp8, int4"),
        (dict(kv_cache_dtype="fp8", tasks=("vt",), endpoint="http://x"), "simulated here"),
        (dict(data="x", endpoint="http://x"), "endpoint='http://x' is about tasks, the heat map"),
        (dict(tasks=("vt",), endpoint="http://x", offset_max=9), "the model that runs here"),
        (dict(tasks=("vt",), endpoint="http://x", every_query=True), "runs here, which is not"),
        (dict(tasks=("vt",), length=4096), r"length=4096 is about held-out text \(--data FILE\)"),
        (dict(tasks=("vt",), squad="x.json"), "squad='x.json' is about that task"),
        (dict(tasks=("vt",), longbench_samples=9), r"LongBench \(--longbench SOURCE\)"),
        (dict(tasks=("vt",), served_model="x"), r"a server \(--endpoint URL\)"),
        (dict(data="x", task_lengths=(4096,)), r"tasks \(--tasks NAME\)"),
        (dict(data="x", heatmap_png=True), r"heatmap_png=True is about the heat map"),
    ):
        with pytest.raises(ValueError, match=words):
            EvalOptions(model="m", **options)
