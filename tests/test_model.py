"""Our model against transformers' LlamaForCausalLM with the same weights, and against formulas in float64."""

import importlib
import random
import sys
from contextlib import nullcontext

import pytest
import torch
from attention_reference import stand_in
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from aquila2_tut import assets
from aquila2_tut.config import Aquila2Config
from aquila2_tut.model import Aquila2ForCausalLM, inverse_frequencies, rotary_tables, rotate, torch_products
from aquila2_tut.model.attention import triton_obstacle
from aquila2_tut.model.documents import AttentionError
from aquila2_tut.model.layers import Linear, RMSNorm, _GatedProduct, packed_for_decoding
from aquila2_tut.model.modeling import ModelError, packed_positions
from aquila2_tut.model.products import onednn_linear_works
from aquila2_tut.model.weights import load_model

FLOOR = 2e-6  # relative to the largest logit: float32 rounding through a handful of layers
ROPES = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
)


def random_shape(seed: int) -> dict:
    """A small configuration: multi-head or grouped, one of the three rotary kinds, 16 trained positions."""
    pick = random.Random(seed)
    heads = pick.choice([2, 4, 6])
    return {
        "vocab_size": pick.choice([61, 97, 128]),
        "hidden_size": heads * pick.choice([8, 16]),
        "intermediate_size": pick.choice([40, 72, 112]),
        "num_hidden_layers": pick.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": pick.choice([n for n in (1, 2, heads) if heads % n == 0]),
        "max_position_embeddings": 16,
        "rms_norm_eps": pick.choice([1e-5, 1e-6]),
        "tie_word_embeddings": pick.random() < 0.3,
        "rope_parameters": ROPES[seed % 3],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def pair(seed: int, **changes) -> tuple[LlamaForCausalLM, Aquila2ForCausalLM]:
    """The reference, never run before (its dynamic scaling remembers earlier calls), and ours, with equal weights."""
    torch.manual_seed(seed)
    shape = random_shape(seed) | changes
    shape["rope_parameters"] = dict(shape["rope_parameters"])
    reference = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    ours = Aquila2ForCausalLM(Aquila2Config(**shape)).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def batch(seed: int, vocab: int, padding: str, length: int = 29) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (2, length) beyond the trained positions, their padding mask, and the positions of real tokens."""
    ids = torch.randint(3, vocab, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :7] = 0
    if padding == "right":
        mask[0, -7:] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def worst(ours: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest difference at real tokens, relative to the largest logit."""
    return (((ours - reference) * mask[..., None]).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("seed", range(20))
def test_logits_equal_llama(seed, padding):
    reference, ours = pair(seed)
    ids, mask, positions = batch(seed, ours.config.vocab_size, padding)
    expected = reference(ids, attention_mask=mask, position_ids=positions).logits
    with torch_products():
        assert worst(ours(ids, attention_mask=mask).logits, expected, mask) == 0.0
    for wanted in (True, False):  # here oneDNN multiplies
        with torch.set_grad_enabled(wanted):
            assert worst(ours(ids, attention_mask=mask).logits, expected, mask) <= FLOOR


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("seed", range(20))
def test_cached_logits_equal_llama(seed, padding):
    reference, ours = pair(seed)
    ids, mask, positions = batch(seed, ours.config.vocab_size, padding)
    theirs_cache = our_cache = None
    for start, end in ((0, 14), (14, 19), *((i, i + 1) for i in range(19, 29))):
        part = {"attention_mask": mask[:, :end], "use_cache": True}
        theirs = reference(
            ids[:, start:end], position_ids=positions[:, start:end], past_key_values=theirs_cache, **part
        )
        mine = ours(ids[:, start:end], past_key_values=our_cache, **part)
        theirs_cache, our_cache = theirs.past_key_values, mine.past_key_values
        assert worst(mine.logits, theirs.logits, mask[:, start:end]) <= FLOOR


@pytest.mark.parametrize("seed", range(20))
def test_gradients_equal_llama(seed):
    reference, ours = pair(seed)
    ids, mask, _ = batch(seed, ours.config.vocab_size, "right")
    labels = ids.masked_fill(mask == 0, -100)
    positions = torch.arange(ids.shape[1])[None]
    for model in (reference.train(), ours.train()):
        model(ids, attention_mask=mask, labels=labels, position_ids=positions).loss.backward()
    for (name, theirs), mine in zip(reference.named_parameters(), ours.parameters(), strict=True):
        floor = FLOOR * theirs.grad.abs().max().item()
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=0, atol=floor, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_generate_gives_the_same_tokens(seed, mode):
    reference, ours = pair(seed, max_position_embeddings=64)
    ids, mask, _ = batch(seed, ours.config.vocab_size, "left", length=12)
    settings = {"max_new_tokens": 24, "do_sample": False, "attention_mask": mask, **mode}
    assert torch.equal(ours.generate(ids, **settings), reference.generate(ids, **settings))


@torch.no_grad()
def test_static_cache_without_a_mask():
    _, ours = pair(0, max_position_embeddings=64)
    ids, _, _ = batch(0, ours.config.vocab_size, "none", length=10)
    cache = StaticCache(config=ours.config, max_cache_len=32)
    first = ours(ids[:, :6], past_key_values=cache, use_cache=True).logits
    second = ours(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat((first, second), 1), ours(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_one_intended_difference_from_llama():
    """Half precision: Aquila multiplies the weight in float32 and then casts, LLaMA casts and then multiplies."""
    torch.manual_seed(0)
    x, norm = torch.randn(64, 256).bfloat16(), RMSNorm(256, 1e-5)
    norm.weight.data = (1 + 0.3 * torch.randn(256)).bfloat16()
    normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    aquila = (normalised * norm.weight.float()).bfloat16()
    llama = normalised.bfloat16() * norm.weight
    assert torch.equal(norm(x), aquila)
    assert not torch.equal(aquila, llama)
    assert (aquila.float() - llama.float()).abs().max() < 0.04
    exact = normalised.double() * norm.weight.double()
    assert (aquila - exact).abs().mean() < (llama - exact).abs().mean()


def test_rms_norm_in_float64():
    x, norm = torch.randn(3, 7, 48), RMSNorm(48, 1e-6)
    norm.weight.data = torch.randn(48)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3, 64), (1, 200)])
def test_onednn_linear_in_float64(shape):
    if not onednn_linear_works():
        pytest.skip("this build of torch has no oneDNN linear operator; the plain path is all there is")
    linear, x = Linear(64, 48), torch.randn(*shape, 64)
    with torch.no_grad():
        exact = x.double() @ linear.weight.double().T
        torch.testing.assert_close(linear(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [None, "x", "w"])
def test_onednn_linear_has_the_gradients_of_float64_and_keeps_only_what_they_need(frozen):
    linear, x = Linear(64, 48), torch.randn(2, 5, 64, requires_grad=frozen != "x")
    linear.weight.requires_grad_(frozen != "w")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = linear(x)
    out.backward(torch.ones_like(out).cumsum(-1))
    exact_w, exact_x = linear.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    (exact_x @ exact_w.T).backward(torch.ones(2, 5, 48, dtype=torch.float64).cumsum(-1))
    for mine, exact, wanted in (
        (x.grad, exact_x.grad, frozen != "x"),
        (linear.weight.grad, exact_w.grad, frozen != "w"),
    ):
        assert (mine is not None) == wanted
        if wanted:
            torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-3)
    assert len(kept) == (2 if frozen is None else 1)


def test_the_gated_product_is_that_of_autograd():
    gate, up = (torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_GatedProduct.apply, (gate, up))
    assert torch.equal(_GatedProduct.apply(gate, up), torch.nn.functional.silu(gate) * up)


@torch.no_grad()
def test_matrices_packed_for_decoding_give_the_same_product_and_are_dropped():
    if not onednn_linear_works():
        pytest.skip("this build of torch has no oneDNN linear operator; the plain path is all there is")
    linear, x = Linear(512, 1024).bfloat16(), torch.randn(1, 1, 512).bfloat16()
    exact = x.double() @ linear.weight.double().T
    with packed_for_decoding(linear):
        assert "packed" in linear.__dict__
        assert list(linear.state_dict()) == ["weight"]
        torch.testing.assert_close(linear(x).double(), exact, rtol=0.01, atol=0.01)
    assert "packed" not in linear.__dict__
    linear.weight.data.mul_(2)
    with packed_for_decoding(linear):
        torch.testing.assert_close(linear(x).double(), 2 * exact, rtol=0.01, atol=0.02)


@torch.no_grad()
def test_only_large_bfloat16_matrices_are_packed():
    for linear in (Linear(512, 1024), Linear(512, 512).bfloat16(), Linear(512, 1024).half()):
        with packed_for_decoding(linear):
            assert "packed" not in linear.__dict__


def test_rotation_depends_on_distance_only():
    config = Aquila2Config.preset("Aquila2-7B", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    q, k = torch.randn(1, 1, 1, 32, dtype=torch.double), torch.randn(1, 1, 1, 32, dtype=torch.double)

    def score(query_at: int, key_at: int) -> float:
        turned = (
            rotate(x, *rotary_tables(config, torch.tensor([[at]]), torch.double))
            for x, at in ((q, query_at), (k, key_at))
        )
        return (next(turned) * next(turned)).sum().item()

    assert score(9, 4) == pytest.approx(score(109, 104), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)


def test_linear_scaling_divides_positions():
    plain = Aquila2Config.preset("AquilaChat2-7B")
    scaled = Aquila2Config.preset("AquilaChat2-7B-16K")
    torch.testing.assert_close(inverse_frequencies(scaled) * 8, inverse_frequencies(plain))


@pytest.fixture(params=["eager", "flash", "triton"])
def backends(request, monkeypatch):
    """Makes two models with equal weights, one on sdpa and one on the backend of the test."""
    backend = request.param
    if backend == "flash":
        attention_module = importlib.import_module("aquila2_tut.model.attention")
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in())
        monkeypatch.setattr(attention_module, "flash_obstacle", lambda q, mask=None: None)
    if backend == "triton" and (obstacle := triton_obstacle(torch.ones(1, 1, 1, 1))):
        pytest.skip(obstacle)

    def make(seed: int, **changes) -> tuple[Aquila2ForCausalLM, Aquila2ForCausalLM]:
        torch.manual_seed(seed)
        shape = random_shape(seed) | {"num_hidden_layers": 2} | changes
        models = [Aquila2ForCausalLM(Aquila2Config(**shape, attn_backend=name)).eval() for name in ("sdpa", backend)]
        models[1].load_state_dict(models[0].state_dict())
        return tuple(models)

    return make


def gradients(model: Aquila2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model.train()(ids, labels=labels, **inputs).loss.backward()
    return {name: p.grad for name, p in model.eval().named_parameters()}


def assert_same_gradients(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, wanted in theirs.items():
        assert (mine[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_training_is_the_same_on_every_backend(backends, padding):
    sdpa, other = backends(5)
    ids, mask, _ = batch(5, sdpa.config.vocab_size, padding, length=21)
    first = mask.cumsum(1) <= 1  # in front of it there may be padding, and what padding predicts means nothing
    labels = ids.masked_fill(first | (mask == 0), -100)
    assert worst(other(ids, attention_mask=mask).logits, sdpa(ids, attention_mask=mask).logits, mask) <= FLOOR
    theirs, mine = (gradients(model, ids, labels, attention_mask=mask) for model in (sdpa, other))
    assert_same_gradients(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("static", [False, True])
def test_decoding_with_a_cache_is_the_same_on_every_backend(backends, padding, static):
    """Prefill, a chunk, single tokens: positions and visible keys as in the whole sequence at once."""
    sdpa, other = backends(0)
    ids, mask, _ = batch(0, sdpa.config.vocab_size, padding, length=18)
    whole = sdpa(ids, attention_mask=mask).logits
    cache = StaticCache(config=other.config, max_cache_len=24) if static else None
    for start, end in ((0, 11), (11, 15), (15, 16), (16, 17), (17, 18)):
        out = other(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert worst(out.logits, whole[:, start:end], mask[:, start:end]) <= 2 * FLOOR


def test_left_padded_batches_generate_the_same_on_every_backend(backends):
    sdpa, other = backends(3, max_position_embeddings=64)
    ids, mask, _ = batch(3, sdpa.config.vocab_size, "left", length=10)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(other.generate(ids, **settings), sdpa.generate(ids, **settings))


DOCUMENTS = torch.tensor([[1] * 5 + [2] * 9 + [3] + [0] * 3, [4] * 18])


def test_packed_documents_do_not_see_each_other(backends):
    """Logits of a packed row are those of its documents alone, on every backend and on sdpa."""
    models = backends(1)
    ids, _, _ = batch(1, models[0].config.vocab_size, "none", length=18)
    for model in models:
        logits = model(ids, document_ids=DOCUMENTS).logits
        for row, start, end in ((0, 0, 5), (0, 5, 14), (0, 14, 15), (1, 0, 18)):
            alone = models[0](ids[row : row + 1, start:end]).logits
            assert worst(logits[row : row + 1, start:end], alone, torch.ones(1, end - start)) <= FLOOR


def test_packed_gradients_are_the_sum_of_the_documents(backends):
    sdpa, other = backends(1)
    ids, _, _ = batch(1, sdpa.config.vocab_size, "none", length=18)
    first = torch.nn.functional.pad(DOCUMENTS[:, 1:] != DOCUMENTS[:, :-1], (1, 0), value=True)
    labels = ids.masked_fill(first | (DOCUMENTS == 0), -100)
    mine = gradients(other, ids, labels, document_ids=DOCUMENTS)
    spans = [(0, 0, 5), (0, 5, 14), (1, 0, 18)]
    total = sum(end - start - 1 for _, start, end in spans)
    alone = [gradients(sdpa, *[ids[row : row + 1, start:end]] * 2) for row, start, end in spans]
    shares = [(end - start - 1) / total for _, start, end in spans]
    summed = {name: sum(w * g[name] for w, g in zip(shares, alone, strict=True)) for name in mine}
    assert_same_gradients(mine, summed)


@torch.no_grad()
def test_a_cache_of_packed_documents_goes_on_with_the_last(backends):
    sdpa, other = backends(4)
    ids, _, _ = batch(4, sdpa.config.vocab_size, "none", length=14)
    documents = torch.tensor([[1] * 6 + [2] * 8, [1] * 3 + [7] * 11])
    first = other(ids[:, :9], document_ids=documents[:, :9], use_cache=True)
    second = other(ids[:, 9:], document_ids=documents, past_key_values=first.past_key_values, use_cache=True)
    for row, start in ((0, 6), (1, 3)):
        alone = sdpa(ids[row : row + 1, start:]).logits[:, 9 - start :]
        assert worst(second.logits[row : row + 1], alone, torch.ones(1, 5)) <= FLOOR


def test_positions_of_packed_documents():
    assert packed_positions(DOCUMENTS).tolist() == [
        [*range(5), *range(9), 0, *range(3)],
        [*range(18)],
    ]


def test_documents_join_the_padding_mask():
    _, ours = pair(0)
    ids, _, _ = batch(0, ours.config.vocab_size, "none", length=18)
    padded = torch.where(DOCUMENTS == 0, 9, DOCUMENTS)
    both = ours(ids, attention_mask=(DOCUMENTS > 0).long(), document_ids=padded).logits
    assert worst(both, ours(ids, document_ids=DOCUMENTS).logits, (DOCUMENTS > 0).long()) <= FLOOR
    with pytest.raises(ModelError, match="not both"):
        ours(ids, attention_mask=torch.ones(1, 1, 18, 18).bool(), document_ids=padded)
    with pytest.raises(ModelError, match="document_ids covers 17 tokens; 0 are cached and 18 are new"):
        ours(ids, document_ids=padded[:, 1:])
    with pytest.raises(AttentionError, match="expected, not -1"):
        ours(ids, document_ids=padded - 2)


def test_a_backend_that_cannot_run_says_so():
    model = Aquila2ForCausalLM(Aquila2Config(**random_shape(0), attn_backend="flash"))
    with pytest.raises(AttentionError, match="'flash' cannot run: it runs on CUDA devices"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_inputs_are_checked():
    _, ours = pair(0)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ModelError, match="exactly one of input_ids and inputs_embeds"):
        ours()
    with pytest.raises(ModelError, match="covers 3 tokens; 0 are cached and 4 are new"):
        ours(ids, attention_mask=torch.tensor([[1, 1, 0]]))


def test_hidden_states_and_attentions():
    reference, ours = pair(4)
    reference.set_attn_implementation("eager")
    ids, _, _ = batch(4, ours.config.vocab_size, "none", length=9)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    theirs, mine = reference(ids, **wanted), ours(ids, **wanted)
    for kind in ("hidden_states", "attentions"):
        assert len(mine[kind]) == len(theirs[kind])
        for a, b in zip(mine[kind], theirs[kind], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    _, ours = pair(1)
    ids, _, _ = batch(1, ours.config.vocab_size, "none")
    ours.train()(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.activation_checkpointing_enable()
    ours(ids, labels=ids).loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-5, atol=1e-7, msg=name)


def test_saves_and_loads_through_the_auto_classes(tmp_path):
    _, ours = pair(2)
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is Aquila2ForCausalLM
    ids, _, _ = batch(2, ours.config.vocab_size, "none")
    assert torch.equal(again.eval()(ids).logits, ours(ids).logits)


def test_trains_under_peft_and_trainer(tmp_path):
    """A LoRA adapter through peft, two steps of transformers' Trainer, with checkpointing and accumulation."""
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    _, ours = pair(3)
    adapted = peft.get_peft_model(
        ours, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 12))]
    settings = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    result = Trainer(adapted, settings, train_dataset=rows).train()
    assert 0 < result.training_loss < 10
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.fixture(scope="module")
def smollm2():
    """The real pretrained model, ours and transformers', on the same tensors."""
    ours = load_model(assets.path("smollm2-135m"))
    config = {k: v for k, v in ours.config.to_diff_dict().items() if k not in ("model_type", "attn_backend")}
    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**config))
    reference = reference.to_empty(device="cpu").eval()
    reference.load_state_dict(ours.state_dict(), assign=True)
    reference.tie_weights()
    frequencies, _ = reference.model.rotary_emb.compute_default_rope_parameters(reference.config)
    reference.model.rotary_emb.inv_freq.copy_(frequencies)
    ids = torch.randint(17, 49152, (2, 48), generator=torch.Generator().manual_seed(0))
    return reference, ours, ids


@torch.no_grad()
def test_smollm2_logits_equal_llama(smollm2):
    reference, ours, ids = smollm2
    with torch_products():
        assert torch.equal(ours(ids).logits, reference(ids).logits)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_with_onednn_is_as_near_to_float64_as_llama(smollm2):
    """Sums taken in another order: neither float32 result is the exact one, and ours is no further from it."""
    reference, ours, ids = smollm2
    exact = load_model(assets.path("smollm2-135m"), torch_dtype="float64")(ids).logits
    everywhere = torch.ones_like(ids)
    floor = worst(reference(ids).logits.double(), exact, everywhere)
    assert worst(ours(ids).logits.double(), exact, everywhere) <= 2 * floor < 5e-6


# oneDNN adds in another order; either way the gradients of this depth are 2e-5 to 5e-5 from those of float64.
@pytest.mark.parametrize(("onednn", "floor"), [(False, FLOOR), (True, 5e-5)])
def test_smollm2_gradients_equal_llama(smollm2, onednn, floor):
    reference, ours, ids = smollm2
    gradients = []
    for model in (reference, ours):
        with nullcontext() if onednn else torch_products():
            model(ids[:1, :16], labels=ids[:1, :16]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    for theirs, mine in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=floor * theirs.abs().max().item())


@pytest.mark.slow
def test_smollm2_64_greedy_tokens_equal_llama(smollm2):
    reference, ours, ids = smollm2
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    assert torch.equal(ours.generate(ids[:1], **settings), reference.generate(ids[:1], **settings))
