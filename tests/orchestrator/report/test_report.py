"""``fimo report``: one page that needs nothing else, whose numbers are the tables', and that runs nobody's code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from fimo.orchestrator.notebook import OpenSweep
from fimo.orchestrator.report import report, words
from fimo.orchestrator.report.figures.scores import last_scores
from fimo.orchestrator.report.page.fill import between, inline, marked, measured
from fimo.orchestrator.report.report import chosen
from fimo.orchestrator.spec.canonical import canonical, sealed
from fimo.orchestrator.store import open_store
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import ranked, schemas
from fimo.orchestrator.tables.matrices import effects_at
from fimo.workers.errors import UsageError
from tests.support.small_sweep import OWN, make_spec, run_here

HOSTILE = '<script>alert("1")</script>\x1b[31m\u202e'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the store and the code of a sweep whose labels are hostile, and its report."""
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(OWN, root / "spec")
    module = root / "spec" / "flowers.py"
    text = module.read_text()
    wanted = "return Workload(_model(), _tensors(n, 0), _tensors(m, 1), _outputs, _loss)"
    assert wanted in text
    told = f"{wanted[:-1]}, labels=[{HOSTILE!r}] * n, ids=[f'row-{{i}}' for i in range(n)])"
    module.write_text(text.replace(wanted, told))
    run_here(make_spec(), root / "spec", open_store(str(root / "store")))
    OpenSweep(Sweep(open_store(str(root / "store")), "flowers")).report(root / "out", code=root / "spec")
    return root


@pytest.fixture
def quick(monkeypatch):
    """No files of figures: one test looks at them."""
    monkeypatch.setattr(report, "KINDS", ())


class Page(HTMLParser):
    """What a page asks for, its scripts, ids and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.asked, self.ids, self.scripts, self.words = [], [], 0, []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.asked.append(value)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(made):
    return Page((made / "out" / "report.html").read_text(encoding="utf-8"))


def test_nothing_is_asked_of_a_network_and_every_link_leads_into_the_page(page):
    inside = [link for link in page.asked if link.startswith("#")]
    assert all(link.startswith(("#", "data:")) for link in page.asked)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in inside} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", "".join(page.words))


def test_what_a_label_says_is_text_without_control_characters(made, page):
    html = (made / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert page.scripts == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", html)


def test_figures_are_there_as_files_and_in_the_page(made, page):
    files = sorted(path.name for path in (made / "out" / "figures").iterdir())
    names = {name.rpartition(".")[0] for name in files}
    assert {name.rpartition(".")[2] for name in files} == {"pdf", "png"}
    assert {"cosine-by-amount", "spearman-by-amount", "cosine-by-seeds", "effects-0", "similarity", "drift"} <= names
    assert names <= set(page.ids)


def test_the_page_has_the_effects_and_scores_of_the_tables(made, page):
    sweep = OpenSweep(Sweep(open_store(str(made / "store")), "flowers"))
    text = " ".join("".join(page.words).split())
    top = sweep.top(0)
    helpful, harmful = top.shown(5)
    for effect in helpful + harmful:
        told = re.sub("<[^>]*>", "", str(measured(effect.effect, effect.sem)))
        assert f"{effect.ids[0]}" in text
        assert " ".join(told.split()) in text
    for row in last_scores(sweep.scores()).to_pylist():
        assert f"{row['score']:.3f}" in text
    step = top.step
    assert words.sure({name: sweep._table(name) for name in schemas.SCHEMAS}, step) in text
    assert sweep._sweep.read_manifest().digest in text


def test_the_rank_beside_an_effect_is_the_estimator_s_own(made, page):
    sweep = OpenSweep(Sweep(open_store(str(made / "store")), "flowers"))
    values = {
        r["removal"]: r["value"]
        for r in sweep.estimates().to_pylist()
        if (r["estimator"], r["eval"]) == ("grad_dot", 0)
    }
    effect = sweep.top(0).shown(1)[0][0]
    rank = 1 + sum(value > values[effect.removal] for value in values.values())
    text = " ".join("".join(page.words).split())
    begin = text.index(f"{effect.name} ({effect.ids[0]})")
    assert re.search(r"grad_dot (\d+)", text[begin:])[1] == str(rank)


def test_it_runs_no_code_from_a_folder_that_the_store_names(made, tmp_path, quick):
    """The store says where the module lies; only the user says which folder's code is run."""
    shutil.copytree(made, tmp_path / "copy")
    module = tmp_path / "copy" / "spec" / "flowers.py"
    ran = tmp_path / "ran"
    module.write_text(f"open({str(ran)!r}, 'w')\n" + module.read_text())
    store = open_store(str(tmp_path / "copy" / "store"))
    values = json.loads(store.get(keys.manifest("flowers")))
    values.pop("seal")
    store.put(keys.manifest("flowers"), canonical(sealed({**values, "beside": str(module.parent)})).encode())
    sweep = OpenSweep(Sweep(store, "flowers"))
    with pytest.warns(UserWarning, match=r"named, not shown: workload flowers:flowers is not in .*--code DIR"):
        sweep.report(tmp_path / "out", [0], code=tmp_path)
    with pytest.warns(UserWarning, match="is not as it was"):
        sweep.report(tmp_path / "out", [0], code=module.parent)
    assert not ran.exists()


def test_other_data_under_the_same_code_is_not_shown(made, tmp_path, quick):
    store = open_store(str(tmp_path / "store"))
    shutil.copytree(made / "store", tmp_path / "store", dirs_exist_ok=True)
    values = json.loads(store.get(keys.manifest("flowers")))
    values.pop("seal")
    store.put(keys.manifest("flowers"), canonical(sealed({**values, "train_digest": "0" * 64})).encode())
    with pytest.warns(UserWarning, match="the examples of workload flowers:flowers are not what they were"):
        OpenSweep(Sweep(store, "flowers")).report(tmp_path / "out", [0], code=made / "spec")


def test_a_ranking_fills_the_cards_only_if_it_is_of_this_sweep_and_step(made, tmp_path, quick):
    shutil.copytree(made / "store", tmp_path / "store")
    store = open_store(str(tmp_path / "store"))
    sweep = OpenSweep(Sweep(store, "flowers"))
    manifest = sweep._sweep.read_manifest()
    effect = np.linspace(-1, 1, 23)
    verified = np.where(np.arange(23) == 21, 5.0, np.nan)
    table = ranked.ranked_table(
        0, effect, effect, effect - 1, effect + 1, verified, verified / 50, verified * 0 + 4, {}
    )

    whole = manifest.spec.canonical()["seeds"]

    def put(step, digest, seeds=whole):
        about = {"sweep": "flowers", "digest": digest, "step": step, "spec": {"seeds": seeds}}
        ranked.write(iter([table]), tmp_path / "ranking", about)
        store.put(keys.table("flowers", "ranking"), (tmp_path / "ranking").read_bytes())
        sweep.report(tmp_path / "out", evals=[0, 1], code=made / "spec")
        html = (tmp_path / "out" / "report.html").read_text()
        return html[html.index('id="example-0"') : html.index('id="example-1"')]

    shown = put(manifest.steps[-1], manifest.digest)
    assert "The most helpful of 23" in shown
    assert re.search(r">21</span><span>\+5\.00 ± 0\.10", shown)
    assert "verified" in shown
    assert "estimated; 90% interval" in shown
    assert "Largest in size: 21 (helpful, verified), " in shown
    assert "The most helpful of 5" in put(manifest.steps[0], manifest.digest)
    with pytest.warns(UserWarning, match="the ranking is of the sweep as it was"):
        assert "The most helpful of 5" in put(manifest.steps[-1], "0" * 64)
    with pytest.raises(UsageError, match="fimo rank"):
        sweep.ranking()
    # The sweep has more seeds since: what is verified there is a mean over fewer.
    with pytest.warns(UserWarning, match="the ranking is of the sweep as it was"):
        assert "The most helpful of 5" in put(manifest.steps[-1], manifest.digest, {**whole, "count": 2})


def test_from_a_shell_it_says_where_the_page_is_and_a_mistake_is_one_line(made, shell, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(made / "spec")
    uri = f"{made}/store/flowers"
    told = shell("report", uri, "--to", tmp_path / "out", "--eval", 2, "--eval", 0, "--json")
    values = json.loads(told.out)
    assert (told.code, values["evals"], values["exit_code"], values["complete"]) == (0, [2, 0], 0, True)
    assert values["report"] == str(tmp_path / "out" / "report.html")
    for words_, said in (
        (["--eval", 7], "examples 0 to 6"),
        (["--step", 5], "step 5 is not recorded"),
        (["--render", "flowers"], "MODULE:FUNCTION"),
        (["--render", "flowers:none"], "no function 'none'"),
    ):
        done = shell("report", uri, "--to", tmp_path / "x", *words_)
        assert (done.code, said in done.err.splitlines()[-1], done.out) == (2, True, "")
    assert shell("report", f"{made}/store/none", "--to", tmp_path / "x").code == 2
    (tmp_path / "file").write_text("")
    assert shell("report", uri, "--to", tmp_path / "file").code == 1


def test_an_incomplete_sweep_is_reported_with_exit_3(made, shell, tmp_path, quick):
    shutil.copytree(made / "store", tmp_path / "store")
    store = open_store(str(tmp_path / "store"))
    for entry in list(store.list("flowers/parts/"))[:3]:
        store.delete(entry.key)
    done = shell("report", f"{tmp_path}/store/flowers", "--to", tmp_path / "out", "--code", made / "spec", "--eval", 0)
    assert done.code == 3
    assert "The sweep is not complete" in (tmp_path / "out" / "report.html").read_text()


def test_one_seed_has_no_interval_and_says_so(made, tmp_path, quick):
    store = open_store(str(tmp_path / "store"))
    run_here(make_spec(seeds=1, estimators=[]), made / "spec", store)
    sweep = OpenSweep(Sweep(store, "flowers"))
    html = sweep.report(tmp_path / "out", code=made / "spec").read_text()
    assert "There is one seed, so that nobody can say how sure" in html
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL).lower().replace("provenance", "")


def test_estimators_that_were_left_out_are_named_and_training_that_exploded_is_not_told_to_take_more_seeds(
    made, tmp_path, quick
):
    store = open_store(str(tmp_path / "store"))
    exploding = {"optimizer": {"name": "sgd", "lr": 1e4}, "epochs": 1}
    spec = make_spec(further_training=exploding, resources={"estimator_budget_s": 1e-9, "proof": False})
    run_here(spec.model_copy(update={"estimators": None}), made / "spec", store)
    html = OpenSweep(Sweep(store, "flowers")).report(tmp_path / "out", [0], code=made / "spec").read_text()
    assert "Left out of the default estimators: " in html
    assert "More seeds would not help" in html


def test_seeds_that_would_tell_an_effect_from_zero():
    effect = SimpleNamespace(effect=1e-3, sem=2e-3)
    top = SimpleNamespace(seeds=10)
    # 3 standard errors: sem must fall by a factor of 6, so 36 times the seeds.
    assert words.seeds_needed(top, [effect]) == 360
    assert words.seeds_needed(top, [effect, SimpleNamespace(effect=-1.0, sem=1e-9)]) == 360
    assert words.seeds_needed(top, [SimpleNamespace(effect=0.0, sem=1e-3)]) is None
    assert words.seeds_needed(SimpleNamespace(seeds=1), [SimpleNamespace(effect=1.0, sem=None)]) is None


def test_the_examples_that_are_chosen_are_those_with_the_clearest_effects(made):
    sweep = OpenSweep(Sweep(open_store(str(made / "store")), "flowers"))
    effects = effects_at(sweep.attribution(), sweep.top(0).step)
    clear = np.sqrt((effects.mean**2).mean(0)) / np.maximum(np.sqrt((effects.sem**2).mean(0)), effects.floor)
    assert chosen(effects, 3) == list(dict.fromkeys([0, *np.argsort(-clear)]))[:3]


@pytest.mark.parametrize(
    ("value", "sem", "text"),
    [
        (0.00178, 0.00017, "(+1.78 ± 0.17) × 10<sup>−3</sup>"),
        (-12.5, 0.5, "−12.50 ± 0.50"),
        (-0.010702, None, "−0.0107"),
        (-1e-5, 2e-4, "(−0.1 ± 2.0) × 10<sup>−4</sup>"),
        (0.0, 0.0, "+0.00 ± 0.00"),
        (0.25, None, "+0.250"),
    ],
)
def test_an_effect_has_the_digits_of_its_standard_error(value, sem, text):
    assert str(measured(value, sem)) == text


def test_the_ends_of_an_interval_differ_where_the_numbers_do():
    """Rounded to two digits each they read "+0.011 to +0.011"."""
    assert str(between(0.01083, 0.01139)) == "+0.01083 to +0.01139"
    assert str(between(-1.7e-4, 2.3e-5)) == "(−1.7 to +0.2) × 10<sup>−4</sup>"


def test_code_in_a_sentence_is_marked_and_nothing_else_of_it_is_html():
    assert str(marked("raise `seeds` & <b>")) == "raise <code>seeds</code> &amp; &lt;b&gt;"
    assert "evil" not in str(inline(b'<?xml?><svg width="1" height="2" viewBox="0"></svg>', "a", "t"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_one_example_at_a_time_and_has_nothing_to_complain_of(made, tmp_path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options = [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--log-level=0", "--dump-dom"]
    done = subprocess.run(
        [*command, *options, f"file://{made}/out/report.html"], capture_output=True, text=True, timeout=60, check=True
    )
    examples = re.findall(r'<section class="example"[^>]*>', done.stdout)
    assert len(examples) > 1
    assert [" hidden" in tag for tag in examples] == [False] + [True] * (len(examples) - 1)
    assert "CONSOLE" not in done.stderr
