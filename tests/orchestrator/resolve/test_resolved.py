"""From a spec to a manifest: digests, mistakes told in one line, and a worker that must see what the driver saw."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fimo.orchestrator.resolve import code, identity
from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import resolve, resolve_again, resolve_like
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.manifest import from_json
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import UsageError, WorkloadError
from fimo.workers.workload import load_workload
from fimo.workers.workloads import recipe
from tests.support.small_sweep import make_spec, run_here
from tests.workers.workloads.tables import write_energy

DOUBLE = """
import flowers

def as_numpy_gives_it():
    w = flowers.flowers()
    cast = lambda data: {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    model = w.model.double()
    return flowers.Workload(model, cast(w.train), cast(w.evals), w.outputs, w.loss)
"""


DROPOUT = """
from pathlib import Path

import flowers
from torch import nn

def dropped():
    w = flowers.flowers()
    p = float((Path(__file__).parent / "dropout.txt").read_text())
    return flowers.Workload(nn.Sequential(w.model, nn.Dropout(p)), w.train, w.evals, w.outputs, w.loss)
"""


def test_what_a_model_reads_from_a_file_gives_other_parts(beside):
    """No tensor, no code and no argument shows a dropout probability."""
    (beside / "drops.py").write_text(DROPOUT)
    found = []
    for p in (0.1, 0.2, 0.1):
        (beside / "dropout.txt").write_text(str(p))
        found.append(resolve(make_spec(workload="drops:dropped"), beside).manifest.digest)
    assert found[0] == found[2] != found[1]


def test_a_configuration_counts_for_what_it_says_and_not_for_where_it_lies():
    transformers = pytest.importorskip("transformers")

    def digest(**more):
        config = transformers.LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, **more
        )
        return identity.architecture(transformers.LlamaForCausalLM(config))

    base = digest(attention_dropout=0.1)
    assert digest(attention_dropout=0.1, name_or_path="elsewhere") == base
    assert digest(attention_dropout=0.2) != base


def test_any_change_of_what_a_delta_depends_on_gives_other_parts(beside):
    def digest(**changes):
        return resolve(make_spec(**changes), beside).manifest.digest

    base = digest()
    assert digest(seeds=9) == base
    assert digest(removals={"indices": [1]}) == base
    assert digest(estimators=["datainf"]) == base
    assert digest(resources={"replicas": "auto", "cpus": 2}) == base
    changed = [
        digest(further_training={"batch_size": 6}),
        digest(further_training={"optimizer": {"name": "sgd", "lr": 0.11}}),
        digest(further_training={"removal_mode": "mask"}),
        digest(further_training={"precision": "float64"}),
        digest(evals=6),
        digest(workload_args={"n": 24}),
    ]
    source = beside / "flowers.py"
    text = source.read_text()
    source.write_text("# a comment\n" + text)
    assert digest() == base
    source.write_text(text.replace("nn.Tanh()", "nn.ReLU()"))
    changed.append(digest())
    assert len({base, *changed}) == 8


def test_code_in_a_module_that_the_workload_imports_counts_too(beside):
    (beside / "wrapper.py").write_text("from helper import make\ndef wrapped():\n    return make()\n")
    (beside / "helper.py").write_text("from flowers import flowers\ndef make():\n    return flowers()\n")
    before = resolve(make_spec(workload="wrapper:wrapped"), beside).manifest.digest
    (beside / "helper.py").write_text("from flowers import flowers\ndef make():\n    x = 1\n    return flowers()\n")
    assert resolve(make_spec(workload="wrapper:wrapped"), beside).manifest.digest != before


def test_code_of_shipped_workloads_that_a_workload_imports_counts_too(beside, monkeypatch, tmp_path):
    """The preparation, the recipe and the network's module of a shipped one; of a user's what it takes from there."""
    reference = "fimo.workers.workloads.energy:energy"
    named = {name.rpartition(".")[2] for name in code.local_modules(reference, beside)}
    assert named == {"energy", "files", "recipe", "tabular"}
    (beside / "mine.py").write_text("from fimo.workers.workloads.files import split\ndef make():\n    return split\n")
    assert {name.rpartition(".")[2] for name in code.local_modules("mine:make", beside)} == {"mine", "files"}
    assert [file.target for file in code.code_files("mine:make", beside)] == ["mine.py"]
    assert code.code_files(reference, beside) == []
    before = [code.source_digest(each, beside) for each in (reference, "mine:make")]
    copied = tmp_path / "workloads"
    shutil.copytree(Path(code.workloads.__file__).parent, copied)
    text = (copied / "files.py").read_text()
    for change, same in (("# a comment\n" + text, True), (text.replace("np.ceil", "np.floor"), False)):
        (copied / "files.py").write_text(change)
        monkeypatch.setattr(code.workloads, "__file__", str(copied / "__init__.py"))
        after = [code.source_digest(each, beside) for each in (reference, "mine:make")]
        assert [a == b for a, b in zip(after, before, strict=True)] == [same, same]


def test_data_and_final_model_beside_the_spec_are_found_wherever_it_is_run_from(beside, monkeypatch, tmp_path):
    spec = make_spec(workload="energy", workload_args={"data": "e.csv", "rows": None}, final_model="e.safetensors")
    write_energy(beside / "e.csv", 60)
    with pytest.raises(UsageError, match=r"'e.safetensors' cannot be read.*python -m fimo.workers.workloads.energy"):
        resolve(spec, beside)
    workload = load_workload(spec.workload, {**spec.workload_args, "initial": 0}, beside)
    recipe.save(workload.model, beside / "e.safetensors")
    monkeypatch.chdir(tmp_path)
    found = resolve(spec, beside)
    bare = spec.model_copy(update={"final_model": None})
    with pytest.raises(WorkloadError, match=r"name a final model .*initial: SEED") as caught:
        resolve(bare, beside)
    assert "\n" not in str(caught.value)
    scratch = bare.model_copy(update={"workload_args": {**spec.workload_args, "initial": 0}})
    # Another start by its name, the same by its numbers.
    assert resolve(scratch, beside).manifest.digest != found.manifest.digest
    report, _, _ = run_here(spec, beside)
    assert report.exit_code == 0


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"workload": "nowhere:flowers"}, UsageError, "'nowhere' not found"),
        ({"workload": "flowers:flower"}, UsageError, "did you mean 'flowers'"),
        ({"workload": "flowers:fails"}, WorkloadError, "ValueError: the data is not there"),
        ({"workload": "flowers:not_one"}, WorkloadError, "returned dict"),
        ({"workload": "flowers:scalar_loss"}, WorkloadError, "one value per example"),
        ({"workload_args": {"rows": 3}}, UsageError, "unexpected keyword argument"),
        ({"evals": 8}, UsageError, "asks for 8"),
        ({"removals": {"indices": [23]}}, UsageError, "there are 23"),
        ({"final_model": "missing.safetensors"}, UsageError, "cannot be read"),
        ({"final_model": "flowers.py"}, WorkloadError, "not a valid safetensors"),
        ({"estimators": ["grad_dott"]}, UsageError, "did you mean 'grad_dot'"),
        ({"estimators": ["grad_dot", "grad_dot"]}, UsageError, "given twice"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(beside, changes, kind, said):
    with pytest.raises(kind) as caught:
        resolve(make_spec(**changes), beside)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_tensors_and_parameters_in_float64_are_cast_as_training_casts_them(beside, precision):
    (beside / "double.py").write_text(DOUBLE)
    spec = make_spec(workload="double:as_numpy_gives_it", seeds=1, further_training={"precision": precision})
    report, _, _ = run_here(spec, beside)
    assert report.exit_code == 0


def test_final_models_that_differ_beyond_float32_have_digests_of_their_own(beside):
    (beside / "double.py").write_text(DOUBLE)
    workload = load_workload("double:as_numpy_gives_it", {}, beside)
    digests = set()
    for by in (0.0, 1e-12):
        state = {name: value + by for name, value in workload.model.state_dict().items()}
        save_file(state, beside / "final.safetensors")
        spec = make_spec(
            workload="double:as_numpy_gives_it",
            final_model="final.safetensors",
            further_training={"precision": "float64"},
        )
        digests.add(resolve(spec, beside).manifest.digest)
    assert len(digests) == 2


def test_a_worker_that_sees_other_code_or_data_refuses_to_compute(beside):
    manifest = resolve(make_spec(), beside).manifest
    assert resolve_like(manifest, None).manifest == manifest
    source = beside / "flowers.py"
    source.write_text(source.read_text().replace("nn.Tanh()", "nn.ReLU()"))
    with pytest.raises(WorkloadError, match="sees the workload's code otherwise than the driver"):
        resolve_like(manifest, None)


def test_a_worker_without_the_driver_s_folder_takes_the_code_of_its_own(beside, monkeypatch, tmp_path):
    from dataclasses import replace

    manifest = replace(resolve(make_spec(), beside).manifest, beside=str(tmp_path / "not-here"))
    monkeypatch.chdir(beside)
    assert resolve_like(manifest, None).manifest == manifest


def test_a_sweep_resolves_again_only_with_the_code_that_it_was_started_with(beside, monkeypatch, tmp_path):
    store = MemoryStore()
    sweep = Sweep(store, "flowers")
    sweep.write_manifest(resolve(make_spec(), beside).manifest)
    assert resolve_again(sweep, Own(beside)).manifest == sweep.read_manifest()
    source = beside / "flowers.py"
    source.write_text(source.read_text() + "\nraise RuntimeError('must not run')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="as it was when the sweep was started"):
        resolve_again(sweep, Own(beside))


def test_a_sweep_does_not_go_on_with_other_data(beside, monkeypatch):
    """It trained everything anew under the old name, without a word."""
    module = "from pathlib import Path\nimport flowers\nHERE = Path(__file__).parent\n"
    module += "def mine():\n    return flowers.flowers(n=int((HERE / 'n.txt').read_text()))\n"
    (beside / "mine.py").write_text(module)
    (beside / "n.txt").write_text("23")
    sweep = Sweep(MemoryStore(), "flowers")
    sweep.write_manifest(resolve(make_spec(workload="mine:mine"), beside).manifest)
    assert resolve_again(sweep, Own(beside)).manifest == sweep.read_manifest()
    (beside / "n.txt").write_text("24")
    with pytest.raises(
        UsageError, match=r"cannot go on: since it was started the training examples changed\. Put that"
    ):
        resolve_again(sweep, Own(beside))


@pytest.mark.parametrize(
    "reference",
    ["fimo.workers.workload:load_workload", "fimo.workers.workload:_import", "fimo.workers.converters:_plain"],
)
def test_a_spec_calls_no_installed_function_that_makes_no_workload(beside, reference):
    """A stranger's spec had the Ray token sent to a server of its choice by a function of fimo."""
    with pytest.raises(UsageError, match=r"annotated '-> Workload'|no module of workloads|has no function"):
        load_workload(reference, {}, beside)


def test_a_manifest_tells_its_data_by_digests_that_survive_its_json_and_count_each_example(beside):
    manifest = resolve(make_spec(), beside).manifest
    assert len(manifest.train_digest) == 64
    assert len(manifest.eval_digests) == len(set(manifest.eval_digests)) == manifest.evals == 7
    assert from_json(manifest.json()) == manifest
    fewer = resolve(make_spec(evals=3), beside).manifest
    assert fewer.eval_digests == manifest.eval_digests[:3]
    assert fewer.train_digest == manifest.train_digest
    words, more = (
        resolve(make_spec(workload="flowers:sentences", removals={"indices": [0]}, workload_args=a), beside).manifest
        for a in ({}, {"n": 18})
    )
    assert words.eval_digests == more.eval_digests
    assert words.train_digest != more.train_digest


def test_a_data_set_that_fails_on_an_item_is_one_line_that_names_it(beside):
    module = "import flowers\n\nclass Torn(flowers.Sentences):\n    def __getitem__(self, index):\n"
    module += "        return self.items[index if index != 9 else 99]\n\n"
    module += "def torn():\n    w = flowers.sentences()\n    return flowers.Workload(w.model, Torn(17, 0), w.evals, "
    module += "w.outputs, w.loss, w.measure)\n"
    (beside / "torn.py").write_text(module)
    spec = make_spec(workload="torn:torn", removals={"indices": [0]})
    with pytest.raises(WorkloadError, match="example 9 of 17 cannot be had from the data set: IndexError") as caught:
        resolve(spec, beside)
    assert "\n" not in str(caught.value)
