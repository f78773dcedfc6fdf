"""Chapter 11: ensembles against plain training, fits against known laws, and requests that cannot be met."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import answered

from qwen_mini import scaling_laws
from qwen_mini.course import cli, home, load_scale, plan, records, small_text
from qwen_mini.course.nb import Notebook
from qwen_mini.kernels.ensemble import Ensemble, EnsembleAdamW
from qwen_mini.model import Qwen, count_parameters, flops_per_token
from qwen_mini.scaling_laws import (
    LossLaw,
    PowerLaw,
    bootstrap,
    fit_batch_law,
    fit_loss_law,
    fit_power_law,
    heldout_losses,
    interval,
    optimal_rates,
    parabola_minimum,
    recommend,
    small_model,
    sweep,
)
from qwen_mini.training import learning_rate_factor

CONFIG = small_model(16, 2, vocab_size=96, length=16)
CHINCHILLA = LossLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
LAWS = {
    "rate": {"scale": 4.0, "exponents": {"N": -0.4, "D": -0.3, "B": 0.4}, "spread": 0.1},
    "batch": {"scale": 1e-3, "exponents": {"D": 1.0}, "spread": 0.0},
    "loss": {"E": 1.0, "A": 30.0, "B": 900.0, "alpha": 0.4, "beta": 0.5, "spread": 0.01},
    "length": 64,
    "largest": [1e5, 1e6],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text():
    """Windows of a text that can be learned: each id follows from the one before, with some noise."""
    generator = np.random.default_rng(0)
    ids = [0]
    for _ in range(60_000):
        ids.append((5 * ids[-1] + 7 + int(generator.integers(4))) % 96)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, np.uint16), 17)[::16]
    return small_text.SmallText(windows[:3600], windows[3600:3640], 1.5)


def models(count, config=CONFIG):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(Qwen(config))
    return made


# ---------------------------------------------------------------- ensembles
@pytest.mark.parametrize("width, layers", [(16, 2), (24, 1), (96, 1)])
def test_members_give_the_logits_of_their_models(width, layers):
    config = small_model(width, layers, vocab_size=96, length=16)
    made, ids = models(3, config), torch.randint(0, 96, (2, 16))
    found = Ensemble(made).logits(ids)
    for model, logits in zip(made, found, strict=True):
        torch.testing.assert_close(logits.view(2, 16, -1), model(ids), rtol=1e-5, atol=1e-5)


def test_a_member_equals_the_model_trained_alone():
    made, rates = models(3), [1e-3, 3e-3, 6e-3]
    ensemble = Ensemble(made)
    adamw = EnsembleAdamW(ensemble)
    batches = torch.randint(0, 96, (8, 4, 17), generator=torch.Generator().manual_seed(3))
    together = []
    for ids in batches:
        losses, gradients = ensemble.gradients(ids[:, :-1], ids[:, 1:])
        adamw.step(gradients, torch.tensor(rates))
        together.append(losses)
    for member, (model, rate) in enumerate(zip(made, rates, strict=True)):
        alone = copy.deepcopy(model)
        groups = [
            {"params": [p for p in alone.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in alone.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), eps=1e-8)
        for ids, losses in zip(batches, together, strict=True):
            optimizer.zero_grad()
            loss = alone(ids[:, :-1], targets=ids[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
            optimizer.step()
            torch.testing.assert_close(losses[member], loss.detach(), rtol=1e-5, atol=1e-5)


def test_members_do_not_see_each_other():
    made, ids = models(2), torch.randint(0, 96, (2, 17))
    _, both = Ensemble(made).gradients(ids[:, :-1], ids[:, 1:])
    _, single = Ensemble(made[1:]).gradients(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(both[1:], single)


def test_a_diverged_member_is_100_and_leaves_the_others_alone(text):
    ensemble = Ensemble(models(2))
    ensemble.weights[0] = math.nan
    losses = heldout_losses(ensemble, text)
    assert losses[0] == 100 and losses[1] < 6


def test_models_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="models of one shape"):
        Ensemble([*models(1), *models(1, small_model(24, 2, 96, 16))])


# ---------------------------------------------------------------- sweeps
def test_a_sweep_equals_a_run_with_the_schedule_of_chapter_08(text):
    found = sweep(text, CONFIG, [3e-3], 64, [2048])[2048][0][0]
    torch.manual_seed(0)
    ensemble = Ensemble([Qwen(CONFIG)])
    adamw = EnsembleAdamW(ensemble)
    for step in range(32):
        factor = learning_rate_factor(step, 32, 3, "wsd", 0.0, 0.2)
        _, gradients = ensemble.gradients(*text.batch(step * 4, 4))
        adamw.step(gradients, torch.tensor([3e-3 * factor]))
    assert found == pytest.approx(heldout_losses(ensemble, text).item(), rel=1e-5)


def test_a_branch_leaves_longer_horizons_as_they_are(text):
    two = sweep(text, CONFIG, [3e-3, 1e-2], 64, [1024, 4096])
    three = sweep(text, CONFIG, [3e-3, 1e-2], 64, [4096, 2048, 1024])
    assert two[1024] == three[1024] and two[4096] == three[4096]
    assert three[4096][0][1] < three[2048][0][1] < three[1024][0][1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_tokens": 40}, "whole windows of 16 tokens, got 40"),
        ({"batch_tokens": 0}, "whole windows of 16 tokens, got 0"),
        ({"rates": []}, "positive rates"),
        ({"rates": [1e-3, -1e-3]}, "positive rates"),
        ({"horizons": []}, "horizons of at least ten batches"),
        ({"horizons": [320]}, "horizons of at least ten batches of 64"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(text, change, message):
    asked = {"rates": [1e-3], "batch_tokens": 64, "horizons": [1024]} | change
    with pytest.raises(ValueError, match=message):
        sweep(text, CONFIG, **asked)


def test_batches_go_round(text):
    ids, targets = text.batch(len(text.train) - 1, 2)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert torch.equal(ids[1], text.batch(0, 1)[0][0])


@pytest.mark.parametrize("width, layers", [(0, 1), (6, 1), (18, 1), (100, 2), (32, 0)])
def test_a_rung_that_cannot_be_is_one_sentence(width, layers):
    with pytest.raises(ValueError, match="a width of at least 8"):
        small_model(width, layers)


# ---------------------------------------------------------------- fits
def test_a_parabola_gives_its_minimum():
    x = np.array([0.0, 1.0, 2.5, 3.0])
    place, height = parabola_minimum(x, 2 + 0.5 * (x - 1.3) ** 2)
    assert (place, height) == pytest.approx((1.3, 2.0))


@pytest.mark.parametrize(
    "x, y, message",
    [
        ([1.0], [2.0], "three points or more, got 1"),
        ([1.0, 2.0], [2.0, 1.0], "three points or more, got 2"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "at the lower end, 1: move the grid"),
        ([3.0, 1.0, 2.0], [1.0, 3.0, 2.0], "at the upper end, 3: move the grid"),
    ],
)
def test_a_grid_without_a_minimum_says_so(x, y, message):
    with pytest.raises(ValueError, match=message):
        parabola_minimum(x, y)


def test_the_step_law_without_noise_is_recovered():
    sizes = [(N, D) for N in (6e7, 3e8, 1e9) for D in (2e9, 3e10)]
    N, D = zip(*sizes, strict=True)
    law = fit_power_law([1.79 * n**-0.713 * d**0.307 for n, d in sizes], N=N, D=D)
    assert law.exponents == pytest.approx({"N": -0.713, "D": 0.307}, abs=1e-6)
    assert law.scale == pytest.approx(1.79, rel=1e-6) and law.spread < 1e-9
    assert law(N=1e6, D=2e7) == pytest.approx(1.65e-2, rel=5e-3)


# Best rate and batch of 17 cells (N in millions, D in billions), read from the Step Law's public runs.
PUBLISHED = """214.7 4 2.76e-3 262|214.7 11.4 2.76e-3 393|214.7 20 3.91e-3 524|214.7 100 7.81e-3 2097
268.3 5 1.95e-3 262|268.3 14.2 3.91e-3 393|268.3 25 3.91e-3 721|268.3 80 3.91e-3 1049
429.3 8 1.95e-3 262|429.3 22.7 1.95e-3 393|429.3 40 2.76e-3 524|429.3 50 1.95e-3 524
536.9 10 9.77e-4 262|536.9 28.4 1.95e-3 393|536.9 50 2.76e-3 721|1073.7 20 1.38e-3 524
1073.7 56.9 1.38e-3 524"""


def test_published_optima_give_the_known_exponents():
    rows = [list(map(float, row.split())) for row in PUBLISHED.replace("\n", "|").split("|")]
    N, D, rate, batch = np.array(rows).T
    law = fit_power_law(rate, N=1e6 * N, D=1e9 * D)
    assert law.exponents == pytest.approx({"N": -0.823, "D": 0.288}, abs=5e-3)
    law = fit_power_law(1e3 * batch, D=1e9 * D)
    assert law.exponents["D"] == pytest.approx(0.498, abs=5e-3)


@pytest.mark.parametrize(
    "y, sizes, message",
    [
        ([1.0, 2.0], {"N": [1.0, 2.0], "D": [1.0, 3.0]}, "3 coefficients .* got 2"),
        ([1.0], {"N": [1.0]}, "2 coefficients .* got 1"),
        ([1.0, 2.0, 3.0], {"N": [1.0, 2.0, 4.0], "D": [20.0, 40.0, 80.0]}, "vary on their own"),
        ([1.0, 2.0, 3.0], {"N": [5.0, 5.0, 5.0]}, "vary on their own"),
        ([1.0, 0.0], {"N": [1.0, 2.0]}, "positive numbers"),
        ([1.0, 2.0], {"N": [-1.0, 2.0]}, "positive numbers"),
        ([1.0, 2.0], {"N": [1.0]}, "one number for each"),
    ],
)
def test_a_power_law_that_is_not_determined_says_so(y, sizes, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(y, **sizes)


def test_a_power_law_is_asked_by_its_sizes():
    law = PowerLaw(2.0, {"N": 0.5})
    assert law(N=4.0) == 4.0
    for wrong in ({}, {"D": 1.0}, {"N": 0.0}, {"N": 1.0, "D": 1.0}):
        with pytest.raises(ValueError, match="positive numbers for N"):
            law(**wrong)


def test_the_law_of_the_batch_also_reads_cells_at_the_edge():
    rows = []
    for N in (1e4, 5e4):
        for D in (5e4, 2e5, 8e5):
            for B in (64, 128, 256):
                best = 2e-4 * D  # 10, 40 and 160 tokens: two of three lie below the grid
                loss = 4 * (N * D) ** -0.01 * math.exp(0.02 * math.log(B / best) ** 2)
                rows.append({"N": N, "D": D, "B": B, "rate": 1e-3, "loss": loss})
    law = fit_batch_law(rows)
    assert law.exponents["D"] == pytest.approx(1.0) and law(D=8e5) == pytest.approx(160)
    with pytest.raises(ValueError, match="two values of D and three batches"):
        fit_batch_law([row for row in rows if row["D"] == 5e4])
    upside_down = [row | {"loss": 1 / row["loss"]} for row in rows]
    with pytest.raises(ValueError, match="show no best batch"):
        fit_batch_law(upside_down)


def test_cells_without_a_minimum_are_left_out():
    cell = {"N": 1, "D": 2, "B": 3, "rates": [1e-3, 2e-3, 4e-3]}
    found = optimal_rates([cell | {"losses": [2, 1, 2]}, cell | {"losses": [1, 2, 3]}])
    assert found == [
        {"N": 1, "D": 2, "B": 3, "rate": pytest.approx(2e-3), "loss": pytest.approx(1.0)}
    ]


@pytest.mark.parametrize("law", [CHINCHILLA, LossLaw(2.0, 30.0, 900.0, 0.5, 0.4)])
def test_a_loss_law_is_recovered(law):
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e5, 1e9, 6), np.geomspace(1e6, 1e11, 6)))
    found = fit_loss_law(N, D, law(N, D))
    assert (found.alpha, found.beta) == pytest.approx((law.alpha, law.beta), abs=3e-3)
    assert found(3e6, 3e7) == pytest.approx(law(3e6, 3e7), rel=1e-3)
    assert found.exponent == pytest.approx(law.exponent, abs=3e-3)


def test_weights_count_points():
    generator = np.random.default_rng(0)
    N, D = generator.uniform(1e4, 1e6, 12), generator.uniform(1e5, 1e7, 12)
    L = CHINCHILLA(N, D) * np.exp(generator.normal(0, 0.01, 12))
    counts = np.array([2, 1, 0, 1, 3, 1, 1, 0, 1, 1, 1, 0])
    weighted = fit_loss_law(N, D, L, weights=counts)
    repeated = fit_loss_law(*(np.repeat(x, counts) for x in (N, D, L)))
    assert weighted(1e5, 1e6) == pytest.approx(repeated(1e5, 1e6), rel=1e-3)


def test_the_optimum_of_chinchilla():
    assert CHINCHILLA.exponent == pytest.approx(0.4516, abs=1e-4)
    for flops, N, D in ((1e15, 3.56e6, 4.68e7), (1e17, 2.85e7, 5.85e8), (1e19, 2.28e8, 7.31e9)):
        assert LossLaw(1.69, 406.4, 410.7, 0.34, 0.28).optimal(flops) == pytest.approx(
            (N, D), rel=5e-3
        )
    assert CHINCHILLA(1e8, 2e9) == pytest.approx(3.4859, abs=1e-4)
    size, tokens = CHINCHILLA.optimal(1e17)
    assert CHINCHILLA(size, tokens) < min(CHINCHILLA(size * f, tokens / f) for f in (0.9, 1.1))
    with pytest.raises(ValueError, match="a budget is a positive number"):
        CHINCHILLA.optimal(0)


def test_a_loss_law_of_too_few_or_impossible_points():
    with pytest.raises(ValueError, match="six runs or more, got 5"):
        fit_loss_law([1e4] * 5, [1e5] * 5, [3.0] * 5)
    with pytest.raises(ValueError, match="must be positive"):
        fit_loss_law([1e4] * 6, [0] * 6, [3.0] * 6)


def test_a_bootstrap_covers_the_truth():
    generator, inside = np.random.default_rng(0), 0
    for _ in range(60):
        x = np.geomspace(1, 100, 20)
        y = 3 * x**-0.5 * np.exp(generator.normal(0, 0.1, 20))
        fit = lambda which: fit_power_law(y[which], x=x[which]).exponents["x"]  # noqa: B023
        low, high = interval(bootstrap(fit, 20, 200))
        inside += low <= -0.5 <= high
    assert 44 <= inside <= 60
    with pytest.raises(ValueError, match="a bootstrap of 2 points"):
        bootstrap(fit, 2)


# ---------------------------------------------------------------- recommendations
def test_a_recommendation_follows_the_laws():
    said = recommend(1e5, 1e6, LAWS)
    assert said.batch_tokens == 1024 and said.steps == 977  # a thousand, in whole windows
    assert said.learning_rate == pytest.approx(4 * 1e5**-0.4 * 1e6**-0.3 * 1024**0.4)
    assert said.flops == 6e11 and said.memory == 2e6 and said.beyond == 1
    assert said.loss == pytest.approx(1 + 30 * 1e5**-0.4 + 900 * 1e6**-0.5)
    assert recommend(1e5, 1e7, LAWS).beyond == 10


@pytest.mark.parametrize("N, D", [(0, 1e6), (-1, 1e6), (1e6, 0), (math.nan, 1e6), (math.inf, 1e6)])
def test_impossible_sizes_are_one_sentence(N, D):
    with pytest.raises(ValueError, match="must be positive numbers"):
        recommend(N, D, LAWS)


def test_the_shipped_laws_recommend_what_a_run_can_use(monkeypatch):
    monkeypatch.setattr(records, "_book", None)  # as outside a notebook
    said = recommend(1e5, 5e5)
    assert 1e-4 < said.learning_rate < 1e-1 and said.batch_tokens % 64 == 0 and 1 < said.loss < 6


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(records, "_book", None)
    monkeypatch.setattr(plan, "measured_speed", lambda: 5e10)
    assert cli.main(["plan", "--params", "1e6", "--tokens", "2e7"]) == 0
    said = capsys.readouterr().out
    assert all(
        word in said for word in ("learning rate", "steps", "this machine", "H100", "40 min")
    )
    assert cli.main(["plan", "--params", "1e6"]) == 2
    assert "--params and --tokens go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", "--params", "-5", "--tokens", "1"])
    assert "greater than 0" in capsys.readouterr().err


def test_the_machine_is_measured():
    assert 1e8 < plan.measured_speed(0.01) < 1e14


@pytest.mark.parametrize(
    "seconds, text",
    [(5, "5 s"), (300, "5 min"), (9000, "2.5 h"), (864_000, "10 days"), (1e9, "31.7 years")],
)
def test_durations(seconds, text):
    assert plan.duration(seconds) == text


# ---------------------------------------------------------------- exercises
BOOK = Notebook(home() / "notebooks" / "11_scaling_laws.ipynb")
EXERCISES = [
    (code, BOOK.code[index + 1]) for index, code in enumerate(BOOK.code) if "BEGIN SOLUTION" in code
]
WRONG = [
    (
        0,
        "for m in settings.ladder: tokens[m] = 1e12 / 6 / count_parameters(rung(*m), embedding=False)",
    ),
    (0, "for m in settings.ladder: tokens[m] = 1e12 / flops_per_token(rung(*m), settings.length)"),
    (0, "tokens[24, 2] = 1e12 / flops_per_token(rung(24, 2), settings.length, training=True)"),
    (1, "return (flops / 6) ** 0.5"),
    (1, "return law.optimal(flops)[1]"),
    (1, "return law.optimal(6 * flops)[0]"),
    (
        1,
        "return (law.alpha * law.A / law.beta / law.B * flops / 6) ** (law.beta / (law.alpha + law.beta))",
    ),
    (2, "return rates[0], rates[-1]"),
    (
        2,
        "a, b, c = np.polyfit(np.log(rates), losses, 2); w = most / a; return math.exp(-b / 2 / a - w), 1",
    ),
    (
        2,
        "p, h = parabola_minimum(np.log(rates), losses); return math.exp(p) * 0.5, math.exp(p) * 2",
    ),
    (
        2,
        "a, b, c = np.polyfit(np.log(rates), losses, 2); p = -b / 2 / a; "
        "w = math.sqrt(most * (c - b * b / 4 / a) / a); return math.exp(p - w), math.exp(p + w)",
    ),
    (3, "law = fit_settings(rows)['rate']; return law.spread"),
    (3, "law = fit_settings(rows)['rate']; return off(law, rows)"),
    (3, "law = fit_settings([r for r in rows if r['N'] < 9e4])['rate']; return off(law, rows)"),
    (3, "return 0.0"),
]


def room() -> dict:
    """What the exercises find defined above them."""
    space = {
        "settings": load_scale("laptop").scaling_laws,
        "truth": CHINCHILLA,
        "math": math,
        "np": np,
    }
    space |= {"count_parameters": count_parameters, "flops_per_token": flops_per_token}
    space |= vars(scaling_laws)
    exec(
        next(code for code in BOOK.code if "def fit_settings(" in code).split("def settings_laws")[
            0
        ],
        space,
    )
    space["rung"] = lambda width, layers: small_model(width, layers)
    space["off"] = lambda law, rows: float(
        np.mean([abs(math.log(law(**{k: r[k] for k in "NDB"}) / r["rate"])) for r in rows])
    )
    return space


def test_there_are_four_exercises():
    assert len(EXERCISES) == 4


@pytest.mark.parametrize("number", range(4))
def test_the_solution_of_an_exercise_passes(number):
    solution, check = EXERCISES[number]
    space = room()
    exec(solution, space)
    exec(check, space)


@pytest.mark.parametrize("number, body", WRONG)
def test_a_wrong_answer_is_refused(number, body):
    solution, check = EXERCISES[number]
    space = room()
    exec(answered(solution, body), space)
    with pytest.raises(AssertionError):
        exec(check, space)
