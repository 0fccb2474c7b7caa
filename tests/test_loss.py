"""The chunked loss against torch's own in float64: values, gradients, and how little memory it takes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from aquila2_tut.config import Aquila2Config
from aquila2_tut.data import collate, pack_best_fit
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.model.costs import peak_bytes
from aquila2_tut.train import TrainError, causal_loss, chunked_cross_entropy, loss

AQUILA_VOCABULARY = 100_008


@pytest.fixture
def small_chunks(monkeypatch):
    """Eight or fewer tokens of a vocabulary of 97 at a time, and 40 rows of the head."""
    monkeypatch.setattr(loss, "_CPU_CHUNK", 8 * 4 * 97)
    monkeypatch.setattr(loss, "_VOCABULARY_ROWS", 40)


def inputs(tokens: int, vocabulary: int, width: int, seed: int = 0, labelled: float = 0.7) -> tuple:
    """Hidden states, a head and labels; logits of a trained model's size, so that softmax is not flat."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width) * 3 / width**0.5
    labels = torch.randint(vocabulary, (tokens,)).where(torch.rand(tokens) < labelled, -100)
    return hidden, weight, labels


def plain(hidden, weight, labels, **options):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, **options)


def in_float64(hidden, weight, labels, **options):
    return F.cross_entropy(F.linear(hidden.double(), weight.double()), labels, **options)


def results(function, hidden, weight, labels, scale: float = 1.0, **options) -> list[torch.Tensor]:
    """The loss and both gradients."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    value = function(hidden, weight, labels, **options)
    (value * scale).backward()
    return [value.detach(), hidden.grad, weight.grad]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor], within: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) <= within
        assert float((a.double() - b.double()).abs().max()) <= within * float(b.abs().max())


@pytest.mark.parametrize(("labelled", "tokens"), [(1.0, 400), (0.3, 400), (1.0, 1)])
def test_equal_to_torch_at_the_vocabulary_of_aquila(labelled, tokens):
    given = inputs(tokens, AQUILA_VOCABULARY, 32, labelled=labelled)
    assert (len(loss._Job(*given, given[2].nonzero(), torch.float32).chunks()) > 1) == (tokens > 1)
    assert_equal(results(chunked_cross_entropy, *given), results(in_float64, *given))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"ignore_index": 5}])
def test_equal_to_torch_over_many_chunks(small_chunks, seed, options):
    hidden, weight, labels = inputs(3 + 9 * seed, 97, 16, seed)
    labels[0] = 11
    labels = labels.where(labels != -100, options.get("ignore_index", -100))
    given = hidden, weight, labels
    assert_equal(results(chunked_cross_entropy, *given, **options), results(in_float64, *given, **options))


def test_gradients_are_the_derivatives(small_chunks):
    hidden, weight, labels = inputs(20, 97, 6)
    pair = [x.double().requires_grad_() for x in (hidden, weight)]
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels), pair)


def test_large_logits_do_not_overflow(small_chunks):
    hidden, weight, labels = inputs(20, 97, 16)
    given = hidden * 1000, weight, labels
    assert_equal(results(chunked_cross_entropy, *given), results(in_float64, *given))


def counted_products(monkeypatch) -> list:
    """Notes the shape of every product that is made."""
    made = []

    def product(x, w):
        made.append((*x.shape, w.shape[0]))
        return F.linear(x, w)

    monkeypatch.setattr(loss, "product", product)
    return made


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)])
def test_only_what_is_trained_gets_a_gradient(small_chunks, monkeypatch, trained):
    hidden, weight, labels = inputs(30, 97, 16, labelled=1.0)
    wanted = results(in_float64, hidden, weight, labels)
    made = counted_products(monkeypatch)
    hidden.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
    value = chunked_cross_entropy(hidden, weight, labels)
    assert value.requires_grad == any(trained)
    if any(trained):
        value.backward()
    chunks = 4  # 30 tokens, at most 8 at a time
    flops = sum(a * b * c for a, b, c in made)
    assert flops == 30 * 97 * 16 * (1 + sum(trained)), "products that nobody asked for, or of tokens without labels"
    assert len(made) == chunks * (1 + trained[0] + 3 * trained[1])
    for x, gradient, is_trained in zip((hidden, weight), wanted[1:], trained, strict=True):
        assert (x.grad is not None) == is_trained
        assert x.grad is None or error(x.grad, gradient) < 1e-5


def test_without_gradients_one_product_a_chunk_is_made(small_chunks, monkeypatch):
    hidden, weight, labels = inputs(30, 97, 16, labelled=1.0)
    wanted = in_float64(hidden, weight, labels)
    hidden.requires_grad_(), weight.requires_grad_()
    made = counted_products(monkeypatch)
    for without in (torch.no_grad(), torch.inference_mode()):
        made.clear()
        with without:
            value = chunked_cross_entropy(hidden, weight, labels)
        assert error(value, wanted) < 1e-6
        assert len(made) == 4


def test_tokens_without_labels_get_no_logits(small_chunks, monkeypatch):
    hidden, weight, labels = inputs(64, 97, 16, labelled=0.2)
    made = counted_products(monkeypatch)
    chunked_cross_entropy(hidden, weight, labels)
    assert sum(shape[0] for shape in made) == int((labels >= 0).sum()) < 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_half_precision_is_no_worse_than_torchs(small_chunks, dtype, way):
    """Both against float64 of the same rounded numbers."""
    hidden, weight, labels = inputs(300, 97, 64)
    if way == "weights":
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    wanted = results(in_float64, hidden.to(dtype), weight.to(dtype), labels)
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        found, theirs = (results(f, hidden, weight, labels) for f in (chunked_cross_entropy, plain))
    assert [x.dtype for x in found] == [torch.float32, hidden.dtype, weight.dtype]
    for mine, their, right in zip(found, theirs, wanted, strict=True):
        assert error(mine, right) <= 1.4 * error(their, right) + 1e-6


def test_the_gradient_of_the_head_is_summed_in_float32(monkeypatch):
    """In half precision many small chunks would round away what a single product keeps."""
    hidden, weight, labels = (x.bfloat16() if x.is_floating_point() else x for x in inputs(512, 97, 32))
    wanted, errors = results(in_float64, hidden, weight, labels)[2], []
    for tokens in (1, 512):
        monkeypatch.setattr(loss, "_CPU_CHUNK", tokens * 4 * 97)
        errors.append(error(results(chunked_cross_entropy, hidden, weight, labels)[2], wanted))
    assert errors[0] < 1.2 * errors[1] < 0.01


def test_a_scaled_loss_has_scaled_gradients(small_chunks):
    given = inputs(50, 97, 16)
    assert_equal(
        results(chunked_cross_entropy, *given, scale=0.25)[1:], [0.25 * x for x in results(in_float64, *given)[1:]]
    )


def test_accumulated_steps_equal_one(small_chunks):
    """Micro-batches with unlike numbers of labels, each summed and divided by the labels of all."""
    hidden, weight, labels = inputs(60, 97, 16)
    wanted = results(in_float64, hidden, weight, labels)[2]
    weight.requires_grad_()
    for part in (slice(0, 13), slice(13, 60)):
        total = chunked_cross_entropy(hidden[part], weight, labels[part], reduction="sum")
        (total / (labels >= 0).sum()).backward()
    assert error(weight.grad, wanted) < 1e-5


def test_one_loss_used_twice(small_chunks):
    given = inputs(50, 97, 16)
    wanted = results(in_float64, *given)
    hidden, weight = (x.clone().requires_grad_() for x in given[:2])
    value = chunked_cross_entropy(hidden, weight, given[2])
    first = torch.autograd.grad(value + 2 * value, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(value, (hidden, weight))
    assert_equal(list(first), [3 * x for x in wanted[1:]])
    assert_equal(list(second), wanted[1:])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True)), "a second pass wrote into the first's"


def test_a_weight_changed_between_two_passes_is_noticed():
    hidden, weight, labels = inputs(20, 97, 16)
    value = chunked_cross_entropy(hidden, weight.requires_grad_(), labels)
    value.backward(retain_graph=True)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_labels_no_loss(reduction):
    hidden, weight, labels = inputs(9, 97, 16, labelled=0.0)
    value, *gradients = results(chunked_cross_entropy, hidden, weight, labels, reduction=reduction)
    assert value == 0
    assert all(not gradient.any() for gradient in gradients)
    assert results(chunked_cross_entropy, hidden[:0], weight, labels[:0])[0] == 0


def test_strided_inputs(small_chunks):
    hidden, weight, labels = inputs(40, 97, 16)
    wanted = results(in_float64, hidden, weight, labels)
    found = results(lambda h, w, y: chunked_cross_entropy(h.t(), w.t(), y), hidden.t(), weight.t(), labels)
    assert_equal([found[0], found[1].t(), found[2].t()], wanted)
    one = hidden[:1].expand(40, 16)
    assert_equal(results(chunked_cross_entropy, one, weight, labels), results(in_float64, one, weight, labels))


def test_what_does_not_fit():
    hidden, weight, labels = inputs(9, 97, 16, labelled=1.0)
    with pytest.raises(TrainError, match=r"expected, not \(9, 16\), \(97, 16\) and \(8,\)"):
        chunked_cross_entropy(hidden, weight, labels[:8])
    with pytest.raises(TrainError, match=r"\(1, 9, 16\)"):
        chunked_cross_entropy(hidden[None], weight, labels)
    with pytest.raises(TrainError, match=r"hidden is torch.bfloat16 and the head torch.float32"):
        chunked_cross_entropy(hidden.bfloat16(), weight, labels)
    with pytest.raises(TrainError, match='"mean" or "sum"'):
        chunked_cross_entropy(hidden, weight, labels, reduction="none")
    for wrong in (97, -1):
        labels[4] = wrong
        with pytest.raises(TrainError, match=f"label {wrong} at token 4 is not in the vocabulary, 0 to 96"):
            chunked_cross_entropy(hidden, weight, labels)


def rehearsed(function, tokens: int, width: int, *, frozen: bool, dtype=torch.float32) -> int:
    """Peak bytes of a step that is not computed: the tensors have a size but no values."""
    with FakeTensorMode():
        hidden = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(AQUILA_VOCABULARY, width, dtype=dtype, requires_grad=not frozen)
        labels = torch.zeros(tokens, dtype=torch.long)
        return peak_bytes(lambda: function(hidden, weight, labels).backward())


@pytest.mark.parametrize(("dtype", "frozen"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_a_quarter_of_the_memory_for_a_real_batch(dtype, frozen):
    """4 rows of 2,048 tokens, the 7B's width, the whole vocabulary."""
    theirs, ours = (rehearsed(f, 4 * 2048, 4096, frozen=frozen, dtype=dtype) for f in (plain, chunked_cross_entropy))
    logits = 4 * 2048 * AQUILA_VOCABULARY * 4
    assert theirs >= 2 * logits
    assert ours <= theirs / 4
    assert ours <= (logits / 8 if frozen else logits / 8 + AQUILA_VOCABULARY * 4096 * 4)


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_does_not_grow_with_the_tokens(frozen):
    """One chunk's logits and the gradients, however many tokens: measured, and the rehearsal says the same."""
    for tokens in (512, 1024):
        hidden, weight, labels = inputs(tokens, AQUILA_VOCABULARY, 8, labelled=2.0)
        hidden.requires_grad_(), weight.requires_grad_(not frozen)

        def step(hidden=hidden, weight=weight, labels=labels) -> None:
            chunked_cross_entropy(hidden, weight, labels).backward()

        measured = peak_bytes(step)
        assert measured == pytest.approx(rehearsed(chunked_cross_entropy, tokens, 8, frozen=frozen), rel=0.01)
        assert measured < loss._CPU_CHUNK + hidden.nbytes + (not frozen) * weight.nbytes + 2**20


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}


def tiny(**changes) -> Aquila2ForCausalLM:
    torch.manual_seed(0)
    return Aquila2ForCausalLM(Aquila2Config(**SHAPE | changes)).train()


def packed_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    sizes = torch.randint(2, 14, (9,)).tolist()
    ids = [torch.randint(3, 97, (size,)) for size in sizes]
    samples = [{"input_ids": x.tolist(), "labels": x.where(torch.rand(len(x)) < 0.7, -100).tolist()} for x in ids]
    return collate(pack_best_fit(samples, 24), 0)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """The loss and gradients of `causal_loss` are those of the model's own forward pass."""
    model.zero_grad()
    wanted = model(**batch).loss
    wanted.backward()
    right = gradients(model)
    model.zero_grad()
    found = causal_loss(model, batch)
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    mine = gradients(model)
    assert mine.keys() == right.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_causal_loss_is_the_models_own(small_chunks, tied, frozen):
    model = tiny(tie_word_embeddings=tied)
    model.lm_head.weight.requires_grad_(not frozen)
    assert_same_step(model, packed_batch())


def test_causal_loss_of_padded_rows(small_chunks):
    batch = packed_batch()
    batch["attention_mask"] = (batch.pop("document_ids") > 0).long()
    assert_same_step(tiny(), batch)


def test_causal_loss_divides_by_the_labels_of_all_batches(small_chunks):
    model, batches = tiny(), [packed_batch(seed) for seed in range(3)]
    many = sum((batch["labels"] >= 0).sum() for batch in batches)
    total = sum(model(**b).loss * (b["labels"] >= 0).sum() for b in batches) / many
    found = sum(causal_loss(model, batch, num_items_in_batch=many) for batch in batches)
    assert found.item() == pytest.approx(total.item(), rel=1e-5)


def test_causal_loss_makes_no_logits(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model.lm_head, "forward", model.lm_head.forward)  # a head that something hangs on is called
    made = []
    model.lm_head.register_forward_hook(lambda *_: made.append(1))
    causal_loss(model, packed_batch())
    assert made == [1]
    monkeypatch.undo()
    causal_loss(model, packed_batch())
    assert made == [1]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_causal_loss_with_adapters(small_chunks, targets):
    """An adapter on the head makes it more than a matrix; it then computes the labelled logits itself."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert_same_step(model, packed_batch())


def test_causal_loss_under_autocast(small_chunks):
    model, batch = tiny(), packed_batch()
    wanted = copy.deepcopy(model).double()(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_loss(model, batch)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-2)


def test_a_batch_without_labels():
    with pytest.raises(TrainError, match="no labels, only document_ids, input_ids"):
        causal_loss(SimpleNamespace(), {"input_ids": torch.ones(1, 2), "document_ids": torch.ones(1, 2)})


def test_training_with_it_learns(small_chunks):
    model, batch = tiny(), packed_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        value = causal_loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 0.2
    assert value.item() == pytest.approx(model(**batch).loss.item(), rel=0.5)
