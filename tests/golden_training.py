"""Goldens of the chapters that train: training, pre-training, long context, SFT, reward model, DPO, GRPO.

The settings are written here, so that a changed scale file moves nothing.
"""

import dataclasses
import functools
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from golden_models import CONFIG, gradients, ids, rand, tiny
from golden_registry import columns, digest, golden, summary
from golden_texts import LEARNED, TALK, TEXTS, examples, hay, tokenizer
from tiny import needle_share
from torch import nn

from qwen_mini import dpo, evaluation, grpo, online_rl, sft
from qwen_mini import long_context as lc
from qwen_mini import pretraining as p
from qwen_mini import reward_model as r
from qwen_mini import scaling_laws as laws
from qwen_mini import tasks as t
from qwen_mini import training as tr
from qwen_mini.corpus import needle_pieces, needle_rows, pack
from qwen_mini.course.scales import Phase, Pretraining, Stage
from qwen_mini.course.small_text import SmallText
from qwen_mini.course.statistics import wilson_interval
from qwen_mini.kernels.ensemble import Ensemble, EnsembleAdamW
from qwen_mini.model import Qwen
from qwen_mini.tokenizer import Tokenizer
from qwen_mini.world import gsm8k, ifeval

PRETRAINING = Pretraining(
    batch_tokens=256, optimizer="muon", learning_rate=3e-3, matrix_learning_rate=0.02, min_lr_ratio=0.1, warmup_steps=2,
    schedule="cosine", decay_fraction=0.2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0,
    grad_accumulation=1,
    phases=(
        Phase(1_024, 32, {"a": 0.7, "b": 0.3}),
        Phase(1_024, 64, {"a": 0.5, "b": 0.2, "needles_64": 0.3}),
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the steps of the post-training chapters read of their sections."""

    learning_rate: float = 1e-3
    matrix_learning_rate: float = 0.01
    min_lr_ratio: float = 0.1
    warmup_steps: int = 1
    epochs: int = 2
    batch_rows: int = 4
    batch_pairs: int = 3
    center: float = 0.01
    beta: float = 0.1
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    micro_groups: int = 2
    max_new_tokens: int = 16
    demonstrations: int = 1
    replay: float = 0.2
    replay_weight: float = 0.3
    problems: int = 1
    samples: int = 2
    pairs_per_problem: int = 1
    queries: int = 3
    group_size: int = 3
    levels: tuple = (1, 2)
    probe: int = 1


NUMBERS = SimpleNamespace(pretraining=PRETRAINING, sft=Tuning())


class MemoryCorpus:
    """What `MixtureSampler`, `LongCorpus` and the measures ask of a corpus, in memory."""

    def __init__(self):
        tok, rows = tokenizer(), {}
        for split, size in (("train", 40), ("heldout", 12)):
            texts = [tok.encode(text) for text in TEXTS] * size
            rows["a", split] = pack(texts, tok.endoftext_id), None
            rows["b", split] = (
                pack([tok.encode(f"{i} plus {i} is {2 * i}.") for i in range(20 * size)], 1_002),
                None,
            )
            made = needle_rows(size, 64, hay(), needle_pieces(tok), f"golden/{split}")
            rows["needles_64", split] = tuple(x.ravel() for x in made)
        self.rows = rows
        self.domains = {name: {"row_tokens": None, "kind": "real"} for name in ("a", "b")}
        self.domains["needles_64"] = {"row_tokens": 65, "kind": "procedural"}
        self.manifest = {"domains": self.domains}

    def tokens(self, domain: str, split: str = "train"):
        return self.rows[domain, split][0]

    def weights(self, domain: str, split: str = "train"):
        return self.rows[domain, split][1]


@functools.cache
def corpus() -> MemoryCorpus:
    return MemoryCorpus()


def moves(trainer: tr.Trainer) -> list:
    """How far training has moved the weights of `tiny()`: the embedding, a matrix and a gain."""
    names = (
        "embed_tokens.weight",
        "layers.1.mlp.up_proj.weight",
        "layers.0.input_layernorm.weight",
    )
    found, start = dict(zip(trainer.names, trainer.masters, strict=True)), tiny().state_dict()
    return [summary(found[f"model.{name}"] - start[f"model.{name}"]) for name in names]


# ---------------------------------------------------------------- training
@golden("training", "linear cross-entropy")
def _():
    hidden, head = rand(700, 16).requires_grad_(), rand(90, 16, seed=1).requires_grad_()
    targets, weights, found = ids(1, 700, high=90)[0], rand(700, seed=2).abs(), []
    for function in (tr.linear_cross_entropy, tr.cross_entropy):
        for shares in (None, weights):
            loss = function(hidden, head, targets, shares)
            found.append([loss, gradients(3 * loss, hidden, head)])
    return found


@golden("training", "learning rates")
def _():
    forms = [("cosine", 0.1, 0.2), ("wsd", 0.1, 0.2), ("wsd", 0.05, 1.0)]
    steps = (0, 3, 9, 10, 11, 40, 81, 90, 99, 100, 150)
    return [[tr.learning_rate_factor(step, 100, 10, *form) for step in steps] for form in forms]


def _steps(make, count: int = 4) -> list:
    """How far a few steps of an optimiser on fixed gradients move parameters."""
    starts = [rand(*shape, seed=i) for i, shape in enumerate(((12, 8), (8, 12), (12, 8), (6,)))]
    params = [nn.Parameter(x.clone()) for x in starts]
    optimizer = make(params)
    for step in range(count):
        for i, x in enumerate(params):
            x.grad = rand(*x.shape, seed=100 + 10 * step + i)
        optimizer.step()
    return [summary(x - start) for x, start in zip(params, starts, strict=True)]


@golden("training", "AdamW")
def _():
    return [
        _steps(functools.partial(tr.AdamW, lr=0.05)),
        _steps(functools.partial(tr.AdamW, lr=0.02, betas=(0.8, 0.9), weight_decay=0.0)),
    ]


@golden("training", "Muon")
def _():
    make = lambda params, **options: tr.Muon(params[:3], dtype=torch.float32, **options)
    flat = tr.orthogonalize(rand(2, 10, 6), dtype=torch.float32)
    return [
        _steps(make)[:3],
        _steps(functools.partial(make, lr=0.1, momentum=0.5))[:3],
        summary(flat),
    ]


def _batch(seed: int) -> tr.Batch:
    rows = ids(4, 33, seed)
    return tr.Batch(rows[:, :-1], rows[:, 1:], rand(4, 32, seed=seed).abs())


def _trainer_steps(**changes) -> dict:
    trainer = tr.Trainer(tiny(), dataclasses.replace(PRETRAINING, **changes), 8)
    records = [trainer.step(_batch(seed % 2)) for seed in range(5)]
    state = tr.training_tensors(trainer)
    return columns(records) | {"weights": moves(trainer), "state": len(state)}


@golden("training", "steps with Muon")
def _():
    return _trainer_steps()


@golden("training", "steps with AdamW")
def _():
    return _trainer_steps(
        optimizer="adamw", grad_accumulation=2, schedule="wsd", decay_fraction=0.5
    )


@golden("training", "a resumed run")
def _():
    losses, found = [], []
    for optimizer in ("muon", "adamw"):
        numbers = dataclasses.replace(PRETRAINING, optimizer=optimizer)
        first, second = (tr.Trainer(tiny(seed=seed), numbers, 8) for seed in (0, 1))
        losses += [first.step(_batch(0))["loss"] for _ in range(2)]
        with tempfile.TemporaryDirectory() as folder:
            tr.save_training_state(Path(folder) / "state", first, [{"loss": 1.0}])
            found.append(tr.load_training_state(Path(folder) / "state", second))
        losses += [trainer.step(_batch(1))["loss"] for trainer in (first, second)]
    return {"losses": losses, "metrics": found}


@golden("training", "update")
def _():
    trainer = tr.Trainer(tiny(), PRETRAINING, 8)
    records = []
    for step in range(4):
        losses = (trainer.model(ids(1, 12, seed=step + i)).square().mean() for i in range(2))
        records.append(trainer.step(losses))
    return columns(records) | {
        "weights": moves(trainer),
        "logits": summary(trainer.model(ids(1, 6))),
    }


# ---------------------------------------------------------------- pre-training
@golden("pretraining", "mixture")
def _():
    sampler = p.MixtureSampler(corpus(), PRETRAINING.phases, 256, seed=3)
    batches = [sampler.batch(step) for step in range(sampler.total_steps)]
    parts = [sampler.batch(1, rank, 2).input_ids for rank in (0, 1)]
    without = SimpleNamespace(manifest={"left_out": ["b"]}, domains=("a", "needles_64"))
    return {
        "ids": [digest([b.input_ids, b.targets]) for b in batches],
        "weights": digest([b.weights for b in batches]),
        "domains": [
            np.repeat(np.arange(len(n)), n) for plan in sampler.plans for n in np.diff(plan, axis=0)
        ],
        "shared": digest(parts),
        "steps": sampler.steps,
        "without b": p.available_phases(PRETRAINING.phases, without)[1].mixture,
    }


@golden("pretraining", "held-out text")
def _():
    model, tok = tiny(), tokenizer()
    bits = [
        p.evaluate_bits_per_byte(model, corpus(), tok, d, 48, 300, stride)
        for d in "ab"
        for stride in (None, 16)
    ]
    nll = p.heldout_nll(model, corpus().tokens("a", "heldout"), 32, 200, 8)
    return {
        "bits": bits,
        "nll": summary(nll),
        "sizes": digest(p.token_sizes(tok)),
        "all": p.evaluate(model, corpus(), tok, 64, 256),
    }


@golden("pretraining", "n-grams")
def _():
    found = p.ngram_nll(corpus().tokens("a"), corpus().tokens("b", "heldout")[:400], 4, 1_024)
    return [found.mean(1), summary(torch.from_numpy(found[-1]))]


# ---------------------------------------------------------------- scaling laws
SMALL = laws.small_model(16, 2, vocab_size=96, length=16)


def _windows() -> SmallText:
    """Windows of ids in which each follows from the one before, up to a choice of four."""
    rng, stream = random.Random("golden/windows"), [0]
    for _ in range(8_000):
        stream.append((5 * stream[-1] + 7 + rng.randrange(4)) % 96)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(stream), 17)[::16]
    return SmallText(windows[:450], windows[450:490], 1.5)


@golden("scaling_laws", "ensemble")
def _():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Qwen(SMALL))
    ensemble = Ensemble(models)
    adamw, found = EnsembleAdamW(ensemble), []
    for step in range(4):
        losses, gradients_ = ensemble.gradients(*_windows().batch(4 * step, 4))
        norms = adamw.step(gradients_, torch.tensor([1e-3, 4e-3]))
        found.append([losses, norms])
    return {"steps": found, "weights": summary(ensemble.weights)}


@golden("scaling_laws", "sweep")
def _():
    return list(
        laws.sweep(_windows(), SMALL, [1e-3, 4e-3], 64, [1024, 2048], seeds=(0, 1)).values()
    )


def _cells() -> list[dict]:
    """Noisy basins over rates, by a law that is known; the lowest of one lies at an end."""
    rng, cells, rates = random.Random("golden/cells"), [], [1e-3, 2e-3, 4e-3, 8e-3]
    for N in (1e4, 4e4):
        for D in (1e5, 4e5):
            for B in (64, 128, 256):
                best = 0.1 * N**-0.4 * D**-0.1 * B**0.3
                basin = [
                    0.1 * np.log(rate / best) ** 2 + 0.02 * np.log(B / D * 1e3) ** 2
                    for rate in rates
                ]
                losses = [3 + 30 * N**-0.4 + x + rng.gauss(0, 0.001) for x in basin]
                cells.append({"N": N, "D": D, "B": B, "rates": rates, "losses": losses})
    return cells


@golden("scaling_laws", "laws")
def _():
    rates = laws.fit_rate_law(_cells())
    rows = [cell | {"loss": rates.lowest[i]} for i, cell in enumerate(_cells())]
    batch = laws.fit_batch_law(rows)
    rng = np.random.default_rng(0)
    N, D = rng.uniform(1e4, 1e6, 12), rng.uniform(1e5, 1e7, 12)
    law = laws.fit_loss_law(N, D, 1.7 + 40 / N**0.3 + 90 / D**0.28)
    drawn, lost = laws.bootstrap(lambda which: float(N[which].mean()), np.arange(12) // 2, 50)
    known = {"rate": rates.law, "batch": batch, "loss": law}
    known = {name: dataclasses.asdict(one) for name, one in known.items()}
    said = laws.recommend(2e5, 3e6, known | {"tuned": 1e6, "length": 64, "largest": [1e5, 1e6]})
    values = dataclasses.asdict(said) | {"loss law": known["loss"], "lost": lost}
    values |= {"curvature": rates.curvature, "interval": laws.interval(drawn)}
    return values | {"optimum": law.optimal(1e13), "exact": law.optimal(1e13, 90.0, 0.8)}


# ---------------------------------------------------------------- long context
def _needles(name: str) -> dict:
    pieces, made = needle_pieces(tokenizer()), {}
    for length in (128, 400):
        rng = random.Random(f"golden/{name}/{length}")
        drawn = [lc.RULER[name](length, hay(), pieces, rng) for _ in range(5)]
        made[str(length)] = digest([[e.prompt, e.answer, e.references] for e in drawn])
    return made | {"first": tokenizer().decode(drawn[0].answer)}


for _name in lc.RULER:
    golden("long_context", f"needle task {_name}")(functools.partial(_needles, _name))


@golden("long_context", "needle rows")
def _():
    pieces, rng = needle_pieces(tokenizer()), random.Random("golden/haystack")
    batches = [
        lc.needle_batch(12, length, hay(), pieces, f"golden/{length}") for length in (128, 300)
    ]
    stacks = [
        lc.haystack(300, n, hay(), pieces, rng, style=style)
        for n in (1, 4)
        for style in ("prose", "compact")
    ]
    return [digest(batches), digest(stacks)]


@golden("long_context", "scores")
def _():
    outputs = ([1, 2, 3, 4], [(2, 3), (4, 5), (4,)]), ([], [(1,)]), ([5, 5], [(5, 5)])
    intervals = [wilson_interval(share, n) for share, n in ((0.0, 10), (0.5, 40), (0.97, 200))]
    return [[lc.score(*pair) for pair in outputs], intervals]


EXTENSION = SimpleNamespace(
    batch_tokens=512,
    needle_share=0.25,
    stages=(Stage(2_048, 20_000.0, (128,), (1.0,)), Stage(1_536, 80_000.0, (256, 128), (0.7, 0.3))),
)


def _extension() -> tuple[lc.LongCorpus, lc.StageSampler]:
    long = lc.LongCorpus(corpus(), tokenizer())
    lc.add_needles(long, (128, 256), 8, 0)
    return long, lc.StageSampler(long, EXTENSION, {"a": 0.6, "b": 0.3, "needles_64": 0.1}, 5)


@golden("long_context", "plan")
def _():
    long, sampler = _extension()
    batches = [sampler.batch(step) for step in range(sampler.total_steps)]
    added = [long.made[f"needles_{n}", split] for n in (128, 256) for split in ("train", "heldout")]
    return {
        "shapes": [list(b.input_ids.shape) for b in batches],
        "ids": [digest(b.input_ids) for b in batches],
        "bases": [sampler.base(step) for step in range(sampler.total_steps)],
        "filler": digest(long.filler("train")),
        "needles": digest(added),
        "order": lc.interleave({8: 0.6, 16: 0.3, 32: 0.1}, 12),
        "mixture": lc.with_needles({"a": 0.6, "needles_64": 0.4}, "needles_8", 0.2),
    }


@golden("long_context", "steps")
def _():
    _, sampler = _extension()
    numbers = dataclasses.replace(PRETRAINING, schedule="wsd", decay_fraction=1.0, warmup_steps=1)
    trainer = lc.ExtensionTrainer(tiny(), numbers, sampler, 256)
    records = [trainer.step(sampler.batch(step)) for step in range(5)]
    config = trainer.model.config
    sizes = [config.rope_theta, config.max_position_embeddings]
    return columns(records) | {"config": sizes, "weights": moves(trainer)}


@golden("long_context", "settings")
def _():
    settings = dataclasses.replace(Tuning(), learning_rate=2e-3)
    found = lc.extension_optimizer(NUMBERS, SimpleNamespace(**vars(settings), batch_tokens=512))
    return rates(found)


def rates(numbers: Pretraining) -> dict:
    """What an optimiser runs with, without the phases."""
    return {name: value for name, value in vars(numbers).items() if name != "phases"}


@golden("long_context", "other ids")
def _():
    other = Tokenizer.train([LEARNED], 380)
    long = lc.LongCorpus(corpus(), other, tokenizer(), 500)
    same = [lc.same_ids(tokenizer(), one) for one in (other, tokenizer())]
    ids = [digest(long.tokens(name, split)) for name in "ab" for split in ("heldout", "train")]
    return {"same": same, "ids": ids}


@golden("long_context", "measures")
def _():
    model, pieces, rng = tiny(), needle_pieces(tokenizer()), random.Random("golden/ask")
    prompt, planted = lc.haystack(100, 2, hay(), pieces, rng)
    cache = model.make_cache(1, 140)
    with torch.inference_mode():
        model.hidden_states(torch.tensor([prompt]), cache=cache)
    answer = lc.ask(model, cache, prompt[:5], 6, model.attention)
    lc.set_base(model, 40_000.0, 512)
    losses = lc.position_losses(model, ids(2, 90))
    return {
        "answer": answer,
        "kept": cache.length,
        "losses": summary(losses),
        "share": needle_share(model, lambda *x: lc.Example([3], [4], [(4,)]), 64, 3, hay(), pieces),
    }


# ---------------------------------------------------------------- SFT
@golden("sft", "masks")
def _():
    talks = {"tools": TALK, "short": TALK[1:2] + [{"role": "assistant", "content": "\nIt is."}]}
    found = {}
    for name, talk in talks.items():
        for mask in sft.MASKS:
            row = sft.row_of(tokenizer(), talk, mask)
            found[f"{name}, {mask}"] = [
                digest(row.ids),
                "".join("01"[int(weight)] for weight in row.weights),
            ]
    return found


def _rows(count: int = 2) -> list[sft.Row]:
    drawn = sft.draw_examples(count, "golden", tasks=["story", "rules", "to_json", "system_rule"])
    return sft.make_rows(
        tokenizer(), [(e, e.response) for e in drawn], system=sft.TRAIN_SYSTEM, seed=1
    )


@golden("sft", "rows")
def _():
    rows = _rows()
    batch, packed = sft.to_batch(rows[:3]), sft.pack_rows(rows, 256)
    return {
        "rows": digest([[row.ids, row.weights] for row in rows]),
        "packed": {k: digest(x) for k, x in packed.items()},
        "batch": digest([batch.input_ids, batch.targets, batch.weights]),
        "windows": sft.pack_best_fit([5, 9, 3, 3, 7, 1], 10),
        "replayed": digest([[row.ids, row.weights] for row in _replayed()]),
    }


def _replayed() -> list[sft.Row]:
    return sft.replay_rows(NUMBERS, lc.LongCorpus(corpus(), tokenizer()), 5, 0.2, 3, 40)


@golden("sft", "plan")
def _():
    rows = [sft.Row([0] * (7 * i % 23 + 2), []) for i in range(41)]
    sampler = sft.RowSampler(rows, 4, 2, seed=5)
    return {"plan": sampler.plan, "shared": [sampler.share(1, rank, 2) for rank in (0, 1)]}


@golden("sft", "drawn problems")
def _():
    drawn = sft.draw_examples(3, "golden", "test", (1, 4), t.WORDINGS)
    shown = [sft.chat_example(sft.with_system(e, "Be brief.")) for e in drawn[::5]]
    gold = sft.demonstrations(3, 0)
    return [
        digest([[e.key, e.messages] for e in drawn]),
        digest(shown),
        digest([[e.key, text] for e, text in gold]),
    ]


@golden("sft", "training rows")
def _():
    long = lc.LongCorpus(corpus(), tokenizer())
    rows = sft.training_rows(NUMBERS, Tuning(), long, tokenizer(), 3)
    return [len(rows), digest([[row.ids, row.weights] for row in rows])]


@golden("sft", "settings")
def _():
    found = sft.optimizer_settings(NUMBERS, sft.slower(Tuning(), epochs=5))
    return rates(found) | {"epochs": sft.slower(Tuning(), epochs=5).epochs}


@golden("sft", "training on rows")
def _():
    found = {}
    for optimizer in ("muon", "adamw"):
        config = SimpleNamespace(pretraining=dataclasses.replace(PRETRAINING, optimizer=optimizer))
        trainer = sft.train_rows(
            config, tiny(), _rows() + _replayed(), sft.slower(Tuning(), 1 / 2, epochs=1), seed=2
        )
        sampler = sft.RowSampler(_rows(), 4, 1)
        found[optimizer] = [
            trainer.step_count,
            moves(trainer),
            trainer.step(sampler.batch(0))["loss"],
        ]
    return found


def _answer(example: t.Example, text: str, finished: bool = True) -> sft.Answer:
    """An answer as sampling would have made it: its tokens end with the end of the turn."""
    tokens = [*tokenizer().encode(text), tokenizer().im_end_id]
    return sft.Answer(example, text, finished, t.TASKS[example.task].verify(example, text), tokens)


def _answers() -> list[list[sft.Answer]]:
    """Four answers to each of nine problems; some right, some wrong, one not finished."""
    groups = []
    for name in ("story", "rules", "to_json"):
        for i, e in enumerate(examples(name, 3)):
            wrong = f"{t.ANSWER}{i + 50}"
            texts = [
                e.response,
                wrong,
                e.response if i else wrong,
                e.response[:-1] if i < 2 else e.response,
            ]
            groups.append(
                [_answer(e, text, finished=n < 3 or i > 0) for n, text in enumerate(texts)]
            )
    return groups


@golden("sft", "statistics")
def _():
    answers, differences = _answers(), rand(3, 20).double().numpy()
    gains = [
        sft.mean_gain(differences),
        sft.mean_gain(differences, 2),
        sft.mean_gain(differences[:1]),
    ]
    return {
        "gains": gains,
        "error": sft.standard_error(answers),
        "accuracy": sft.accuracy(answers),
        "any": sft.pass_any(answers),
        "areas": sft.by_area(answers),
        "problems": sft.by_problem(answers),
        "batches": list(sft.length_batches([5, 1, 4, 9, 1], 2)),
    }


@golden("sft", "sampled answers")
def _():
    model = tiny(dataclasses.replace(CONFIG, max_position_embeddings=512))
    drawn = sft.draw_examples(1, "golden", tasks=["story", "purchase"])
    answers = sft.evaluate_tasks(model, tokenizer(), drawn, 1.0, 2, 12, seed=4)
    return [[a.tokens, a.finished, a.verdict.correct] for group in answers for a in group]


@golden("sft", "kept answers")
def _():
    with mock.patch.object(sft, "evaluate_tasks", lambda *x, **options: _answers()):
        kept = [sft.rejection_sample(None, tokenizer(), [], most=most) for most in (1, 3)]
    return [digest([[e.key, text] for e, text in pairs]) for pairs in kept] + [len(kept[0])]


@golden("sft", "long instructions")
def _():
    made = sft.long_instructions(6, 150, hay(), tokenizer(), "golden")
    return {"hash": digest(made), "first": made[0][1]}


# ---------------------------------------------------------------- reward model
def _reward_model() -> r.RewardModel:
    return tiny(kind=r.RewardModel)


def _pairs(count: int = 7) -> list[r.Pair]:
    """Preference pairs of random ids, none of them a control token."""
    rng = random.Random("golden/pairs")
    draw = lambda low, high: [rng.randrange(30, 900) for _ in range(rng.randint(low, high))]
    return [r.Pair(draw(5, 20), draw(1, 9), draw(1, 9)) for _ in range(count)]


@golden("reward_model", "loss")
def _():
    better, worse = rand(6).requires_grad_(), rand(6, seed=1).requires_grad_()
    losses = [
        r.bradley_terry_loss(better, worse, **x) for x in ({}, {"margin": 0.5}, {"center": 0.1})
    ]
    return [torch.stack(losses), gradients(sum(losses), better, worse)]


@golden("reward_model", "styles and criteria")
def _():
    found = {}
    for name in r.STYLE_TASKS:
        rng, drawn = random.Random(f"golden/styled/{name}"), examples(name, 3)
        texts = [[e, r.styled(e, rng)] for e in drawn for _ in range(4)]
        held = ["".join("01"[x] for x in r.criteria(e, text).values()) for e, text in texts]
        found[name] = [
            digest([text for _, text in texts]),
            held,
            [r.gold_reward(e, text) for e, text in texts],
        ]
    return found


@golden("reward_model", "verdicts on fixed texts")
def _():
    [e] = examples("story", 1)
    remarks = [r.FILLER, r.OFF_TOPIC, r.RUDE, r.BIASED]
    texts = [
        e.response,
        *(f"{kind[0]}\n{e.response}" for kind in remarks),
        e.response.split("\n")[-1],
        "",
        "Hello.",
        f"{e.response}1",
        f"{r.RUDE[0]}\n{r.FILLER[1]}\n{t.ANSWER}x",
        f"{r.FILLER[0]}\n{e.response}\n",
    ]
    rewards = [r.gold_reward(e, text) for text in texts]
    return [["".join("01"[x] for x in r.criteria(e, text).values()) for text in texts], rewards]


@golden("reward_model", "labelled pairs")
def _():
    rows = [r.label_pairs(tokenizer(), _answers(), flip=flip, seed=1) for flip in (0.0, 0.5)]
    found = [digest([dataclasses.astuple(pair) for pair in pairs]) for pairs in rows]
    return {"hash": found, "count": len(rows[0]), "gold": r.gold_rewards(_answers())}


@golden("reward_model", "scores")
def _():
    model = _reward_model()
    rows = [pair.prompt + pair.chosen for pair in _pairs()]
    return [
        r.score_rows(model, rows, 3),
        r.pair_accuracy(model, _pairs()),
        digest(r.pad_right(rows)),
    ]


@golden("reward_model", "initial head")
def _():
    torch.manual_seed(1)
    return summary(r.RewardModel(CONFIG).score.weight)


@golden("reward_model", "from a policy")
def _():
    with tempfile.TemporaryDirectory() as folder:
        tiny().save_pretrained(folder)
        models = [
            r.RewardModel.from_policy(folder, 3),
            r.RewardModel.from_policy(folder, 3, layers=1),
        ]
    rows = [pair.prompt + pair.chosen for pair in _pairs()]
    return [[r.score_rows(model, rows), model.config.num_hidden_layers] for model in models]


@golden("reward_model", "settings")
def _():
    return rates(r.adamw_settings(NUMBERS, Tuning(learning_rate=5e-4, warmup_steps=3)))


@golden("reward_model", "steps")
def _():
    trainer = tr.Trainer(_reward_model(), r.adamw_settings(NUMBERS, Tuning()), 1)
    trainer.total_steps, step = r.reward_steps(trainer, _pairs(), Tuning(), seed=2)
    return columns([step(number) for number in range(4)]) | {
        "steps": trainer.total_steps,
        "weights": moves(trainer),
    }


@golden("reward_model", "choice among answers")
def _():
    proxy, gold = rand(5, 6).numpy(), rand(5, 6, seed=1).numpy()
    ranks = [
        r.rank_correlation([1, 2, 2, 4], [2, 1, 3, 3]),
        r.correlation_by_chance([1, 2, 3, 4], [1, 3, 2, 4]),
    ]
    return [r.best_of_n(proxy, gold, (1, 2, 6)), ranks]


# ---------------------------------------------------------------- DPO
@golden("dpo", "loss")
def _():
    parts = [(10 * rand(5, seed=seed) - 40).requires_grad_() for seed in range(4)]
    forms = [{}, {"beta": 0.5}, {"label_smoothing": 0.2}, {"kind": "hinge"}, {"kind": "ipo"}]
    losses = [dpo.dpo_loss(*parts, **form) for form in forms]
    return [losses, [gradients(loss.sum(), *parts[:2]) for loss in losses]]


@golden("dpo", "pairs")
def _():
    found = [
        dpo.build_pairs(tokenizer(), _answers(), 1, most, match)
        for most in (1, 2)
        for match in (False, True)
    ]
    hashes = [digest([dataclasses.astuple(pair) for pair in pairs]) for pairs in found]
    return {"hash": hashes, "count": [len(pairs) for pairs in found]}


@golden("dpo", "fresh pairs")
def _():
    asked = []

    def answers(model, tok, problems, *options):
        asked.append([[[e.key, e.messages] for e in problems], options])
        return _answers()

    with mock.patch.object(dpo, "evaluate_tasks", answers):
        pairs = dpo.fresh_pairs(None, tokenizer(), Tuning(), 2)
    return [digest(asked), digest([dataclasses.astuple(pair) for pair in pairs])]


@golden("dpo", "log-probabilities")
def _():
    model, batch = tiny(), dpo.pair_batch(_pairs(4))
    with torch.no_grad():
        tokens = dpo.token_logprobs(model, batch, 0.7)
        return [
            digest([batch.input_ids, batch.weights]),
            summary(tokens),
            dpo.pair_logprobs(model, _pairs(4)),
        ]


@golden("dpo", "online merging")
def _():
    bases = [rand(*shape, seed=50 + i) for i, shape in enumerate(((12, 8), (8, 12), (12, 8), (6,)))]
    forms = [
        dict(),
        dict(method="ties"),
        dict(rescale=False),
        dict(method="ties", weighted=True, weight_decay=0.1),
    ]
    make = lambda **form: functools.partial(
        dpo.OnlineMergingAdamW, bases=bases, lr=0.02, alpha=0.1, **form
    )
    return [_steps(make(**form)) for form in forms]


@golden("dpo", "steps")
def _():
    found = {}
    for merging in (False, True):
        trainer = tr.Trainer(tiny(), r.adamw_settings(NUMBERS, Tuning()), 1)
        trainer.total_steps, step = dpo.preference_steps(trainer, _pairs(), Tuning(), seed=2)
        if merging:
            bases = list(tiny(seed=1).parameters())
            trainer.optimizers = [
                dpo.OnlineMergingAdamW(trainer.masters, bases, lr=1e-3, alpha=1e-3, seed=3)
            ]
            trainer.peaks = [[1e-3]]
        records = columns([step(number) for number in range(4)])
        found["merging" if merging else "AdamW"] = records | {"weights": moves(trainer)}
    return found


# ---------------------------------------------------------------- GRPO
@golden("grpo", "advantages")
def _():
    rewards = [[1, 0, 0.5, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    return [grpo.group_advantages(rewards, scale) for scale in (True, False)]


@golden("grpo", "loss")
def _():
    mask = torch.arange(5) < torch.tensor([4, 2, 5, 3])[:, None]
    now, old, reference = (-rand(4, 5, seed=seed).abs() * mask for seed in range(3))
    gains, found = rand(4, seed=3), {}
    for kind in grpo.LOSSES:
        for name, options in (
            ("", {}),
            (", KL", {"beta": 0.1}),
            (", both", {"beta": 0.1, "bias_corrected_kl": True}),
        ):
            logprobs = now.clone().requires_grad_()
            theirs = reference if options else None
            loss, seen = grpo.grpo_loss(
                logprobs, old, gains, mask, theirs, kind, epsilon_high=0.28, max_length=8, **options
            )
            found[kind + name] = [loss, gradients(loss, logprobs), seen]
    return found


def _groups() -> list[grpo.Group]:
    """Four groups of three answers each; one of them has equal rewards."""
    rng = random.Random("golden/groups")
    draw = lambda low, high: [rng.randrange(30, 900) for _ in range(rng.randint(low, high))]
    rewards = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.2, 0.5, 0.9]]
    return [grpo.Group(draw(5, 20), [draw(2, 12) for _ in range(3)], earned) for earned in rewards]


@golden("grpo", "log-probabilities")
def _():
    with torch.no_grad():
        found, mask = grpo.group_logprobs(tiny(), _groups(), 0.8)
    return [summary(found), digest(mask)]


def _policy_steps(kind: str, inner_steps: int = 1, reference: bool = False) -> dict:
    trainer = tr.Trainer(tiny(), r.adamw_settings(NUMBERS, Tuning(learning_rate=3e-3)), 6)
    options = {
        "kind": kind,
        "inner_steps": inner_steps,
        "reference": tiny(seed=1) if reference else None,
    }
    records = [grpo.policy_update(trainer, _groups(), Tuning(), **options) for _ in range(3)]
    return columns(records) | {"weights": moves(trainer)}


for _kind in grpo.LOSSES:
    golden("grpo", f"steps, {_kind}")(functools.partial(_policy_steps, _kind))
golden("grpo", "steps, two inner steps and a reference")(
    functools.partial(_policy_steps, "dapo", 2, True)
)


@golden("grpo", "queries")
def _():
    kinds = [
        ("story", 1, "shown"),
        ("story", 1, "shown"),
        ("rules", 2, "asked"),
        ("cycle", 1, "shown"),
    ]
    weights = grpo.query_weights(kinds, [[1, 0, 0, 1], [1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
    drawn = [
        [e.key, e.messages] for step in (0, 1) for e in grpo.fresh_queries(6, weights, 4, step)
    ]
    order = grpo.order_by_reward_variance([[1, 1, 1], [0, 1, 0], [0.5, 0.6, 0.5]])
    return {
        "weights": list(weights.values()),
        "drawn": digest(drawn),
        "first": drawn[0][0],
        "order": order,
    }


@golden("grpo", "rewards")
def _():
    return [grpo.verified(_answers()[:3])]


def _even(answers) -> list[list[float]]:
    """A reward that even a random model earns: the share of even ids."""
    share = lambda tokens: sum(token % 2 == 0 for token in tokens) / len(tokens)
    return [[share(a.tokens) for a in group] for group in answers]


@golden("grpo", "a run")
def _():
    model = tiny(dataclasses.replace(CONFIG, max_position_embeddings=512))
    trainer = tr.Trainer(model, r.adamw_settings(NUMBERS, Tuning()), 6)
    asked = {("story", 1, "shown"): 0.5, ("system_rule", 1, "asked"): 0.5}
    step = grpo.optimize_policy(trainer, tokenizer(), Tuning(), asked, 1, _even)
    return columns([step(number) for number in range(3)]) | {"weights": moves(trainer)}


@golden("grpo", "probe")
def _():
    asked = []

    def groups(model, tok, problems, settings, seed):
        asked.extend([e.key, e.messages] for e in problems)
        rewards = [[1.0, 0.0, float(len(e.key) % 2)] for e in problems]
        return [], [grpo.Group([], [], earned) for earned in rewards]

    with mock.patch.object(grpo, "roll_out", groups):
        grpo.probe(None, tokenizer(), Tuning(), 1)
    return {"asked": digest(asked), "count": len(asked)}


# ---------------------------------------------------------------- online RL
@golden("online_rl", "rewards")
def _():
    model, answers = _reward_model(), _answers()[:3]
    return [make(model, tokenizer())(answers) for make in (online_rl.judged, online_rl.mixed)]


@golden("online_rl", "pool")
def _():
    return digest([[e.key, e.messages] for e in online_rl.pool_of(Tuning(), 12, 3)])


@golden("online_rl", "steps within a budget")
def _():
    sampler = sft.RowSampler([sft.Row([1] * (5 + i), []) for i in range(10)], 4, 2)
    return [online_rl.steps_within(passes, sampler) for passes in (1, 100, 579, 2_000)]


# ---------------------------------------------------------------- evaluation
@golden("evaluation", "numbers")
def _():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 60)) < 0.4
    found = {"paired": evaluation.paired_interval(first, second)}
    found["interval"] = evaluation.bootstrap_interval(rng.random((40, 3)), seed=1)
    found["pass@k"] = [evaluation.pass_at_k(10, c, 4) for c in range(11)]
    return found | {"least": [evaluation.detectable_difference(n) for n in (9, 144, 1_008)]}


@golden("evaluation", "suite")
def _():
    # the two others quote the files of whoever's Python runs this
    names = [name for name, b in evaluation.BENCHMARKS.items() if b.quiz in ("", "words")]
    items = evaluation.suite(6, 1, names)
    prompt = lambda e: evaluation.prompt_of(tokenizer(), e, shots=2)
    asked = [prompt(item.example) if item.example else [*vars(item).values()] for item in items]
    return {"count": len(items), "asked": digest(asked)}


@golden("evaluation", "likelihoods")
def _():
    items = evaluation.suite(5, 2, ["words", "words, 10"])
    lines = evaluation.choose(tiny(), tokenizer(), items + evaluation.swapped(items))
    return {line: [one[line] for one in lines] for line in ("logprobs", "chosen", "correct")}


@golden("evaluation", "instructions")
def _():
    requests = ifeval.requests(2 * len(ifeval.KINDS), 3)
    texts = [request.text for request in requests] + ['"*a*, *b*"\nP.S. no', "A B\n***\nC"]
    kept = ifeval.other_scores([request.facts for request in requests], texts[2:])
    numbers = [str(gsm8k.last_number(text)) for text in ("1,250 of 2", "5-3", "-0.50 %", "no")]
    return {"requests": digest([*map(list, requests)]), "kept": kept, "numbers": numbers}


@golden("evaluation", "responses")
def _():
    items = evaluation.suite(3, 1, ["logic", "code", "words"])
    numbers = evaluation.Settings(2, 3, 1.0, 6, batch_rows=8)
    plan = evaluation.plan_batches(tokenizer(), items, numbers, 2_048)
    answers = [line for line in _answers()[:2] for line in line]
    lines = [{"responses": [a.text], "finished": [a.finished]} for a in answers]
    asked = [evaluation.Item("x", str(i), example=a.example) for i, a in enumerate(answers)]
    return {"plan": plan, "luck": evaluation.right_by_luck(asked, lines)}
