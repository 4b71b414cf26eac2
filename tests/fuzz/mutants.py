"""Would the tests notice? Faults put by hand into the modules that guard, one at a time: `make mutants`.

Each mutant replaces one piece of text in one file of a copy of the project, and the tests named with it are run
there. A mutant that they do not notice survives: then a test is missing. `tests/fuzz/test_mutants.py` sees to it that
every text is still there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "minilora",
    "kernels",
    "scripts",
    "tests",
    "assets",
    "docs",
    "notebooks",
    "README.md",
    "pyproject.toml",
    "constraints.txt",
)


class Mutant(NamedTuple):
    """A fault: `old`, which stands once in the file, becomes `new`."""

    file: str
    old: str
    new: str
    tests: str  # files of tests, and perhaps -k WORD


REDACTION, REMOTE, ERRORS = (f"minilora/system/{name}.py" for name in ("redaction", "remote", "errors"))
FILES, LOAD = "minilora/system/files.py", "minilora/inference/load.py"
SCHEMA, TERMINAL = "minilora/system/schema.py", "minilora/system/terminal.py"
PICKLED = "minilora/formats/pickled.py"
DORA = "minilora/dora.py"
GATHERING, LOADING = (f"minilora/parallel/{name}.py" for name in ("gathering", "loading"))
TRUST = "tests/scripts/test_trust.py"

MUTANTS = [
    # ---- secrets ----
    Mutant(REDACTION, 'user, at, host = authority.rpartition("@")', 'user, at, host = authority.partition("@")', "tests/system/test_redaction.py"),
    Mutant(REDACTION, 'if ":" in (user or host) and "@" in path:', "if False:", "tests/system/test_redaction.py"),
    Mutant(REDACTION, "elif at and not (", "elif at and user.count(':') and not (", "tests/system/test_redaction.py"),
    Mutant(REDACTION, 'return _QUERY.sub("", rest)', "return rest", "tests/system/test_redaction.py"),
    Mutant(REDACTION, 'r"[?#;]', 'r"[?#]', "tests/system/test_redaction.py"),
    Mutant(REDACTION, "without_secrets(spaceless)", "spaceless", "tests/system/test_redaction.py"),
    Mutant(REDACTION, 'r"\\s", "%20"', 'r"\\s", " "', "tests/system/test_redaction.py"),
    Mutant(REDACTION, "return str, (str(self),)", "return Address, (self._whole,)", "tests/system/test_redaction.py"),
    Mutant(REDACTION, "(?:(?!,\\w[\\w+.-]*://)\\S)*", "\\S*", "tests/system/test_redaction.py"),
    Mutant(ERRORS, 'printable(without_secrets(" ".join(text.splitlines())))', 'printable(" ".join(text.splitlines()))', TRUST),
    Mutant(TERMINAL, "c if c.isprintable() else _escaped(c)", "c", "tests/system/test_terminal.py"),
    Mutant(TERMINAL, "\\u2066-\\u2069", "", "tests/system/test_terminal.py"),
    Mutant(ERRORS, "{text[:290]} ... {text[-195:]}", "{text[:500]}", "tests/system/test_errors.py"),
    Mutant(ERRORS, "[hide_secrets(entry) for entry in value]", "value", "tests/system/test_errors.py"),
    Mutant("minilora/run/settings.py", "hidden = [hide_secrets(text) for text in texts]", "hidden = texts", TRUST),
    Mutant("scripts/compare.py", "without_secrets(str(value))", "str(value)", "tests/scripts/test_compare.py"),
    Mutant("minilora/run/page.py", r'.replace("<", "\\u003c")', "", "tests/run/test_page.py"),
    Mutant("minilora/run/output_dir.py", "KEPT_HERE = {ANSWERS_FILE}", "KEPT_HERE = set()", "tests/run/test_answers.py"),
    Mutant("minilora/run/output_dir.py", "private=config.names_an_address()", "private=False", TRUST),
    Mutant("scripts/sweep.py", "    refuse_secrets(settings, config)\n", "", TRUST),
    # ---- connections ----
    Mutant(REMOTE, '"s3", "gs", "abfs"', '"s3", "gs", "file", "abfs"', "tests/system/test_remote.py"),
    Mutant(REMOTE, 'if "::" in', 'if ":::" in', "tests/system/test_remote.py"),
    Mutant(REMOTE, 'if scheme == "http" and _host', 'if scheme == "HTTP" and _host', "tests/system/test_remote.py"),
    Mutant(REMOTE, "_host(text) not in _THIS_MACHINE", 'not (_host(text) or "").startswith("127.")', "tests/system/test_remote.py"),
    Mutant(REMOTE, "build_opener(_Redirects)", "build_opener()", "tests/system/test_remote.py"),
    Mutant(REMOTE, "request.add_unredirected_header", "request.add_header", "tests/data/test_readers.py"),
    Mutant(REMOTE, 'if "@" in parts.netloc or parts.query:', 'if ":" in parts.netloc or parts.query:', "tests/system/test_remote.py"),
    Mutant(REMOTE, 'text.startswith(("//", ', 'text.startswith(("///", ', "tests/system/test_remote.py"),
    Mutant(LOAD, 'refuse_address(raw["base_model_name_or_path"], str(adapter / ADAPTER_CONFIG_FILE), "--model")', "pass", TRUST),
    Mutant("scripts/evaluate.py", 'refuse_address(name, f"the adapter\'s {SETTINGS_FILE}", "--dataset")', "pass", TRUST),
    Mutant("minilora/run/dataset_info.py", 'refuse_address(entry.get(field) or "", location, "--dataset")', "pass", TRUST),
    # ---- outputs over inputs, empty values, the card ----
    Mutant(FILES, "os.path.samefile(path, read)", "path == read", TRUST),
    Mutant(FILES, 'if path.suffix.lower() != ".png":', "if False:", TRUST),
    Mutant("minilora/run/output_dir.py", 'refuse_overwrite("output_dir", directory, [model_dir])', "pass", TRUST),
    Mutant("minilora/run/output_dir.py", 'refuse_overwrite("the run\'s", directory / file, dataset_names(config))', "pass", TRUST),
    Mutant("scripts/chat.py", "[options.input, *setup.files]", "[options.input]", TRUST),
    Mutant("minilora/run/settings.py", "if any(isinstance(text, str) and not text.strip() for text in texts):", "if False:", "tests/run/test_settings.py"),
    Mutant(ERRORS, 'if word == "" or re.fullmatch(r"--[\\w-]+=", word):', 'if word == "":', "tests/system/test_errors.py"),
    Mutant("minilora/run/model_card.py", 'r"[\\\\`*\\[\\]<>|&~]', 'r"[\\\\`*\\[\\]|&~]', TRUST),
    # ---- tables of fields ----
    Mutant(SCHEMA, "type(value) not in kinds or not", "not isinstance(value, kinds) or not", "tests/system/test_schema.py"),
    Mutant(SCHEMA, "self.low is None or self.low <= value", "self.low is None or self.low < value", "tests/system/test_schema.py"),
    Mutant(SCHEMA, "value.isprintable() or not self.one_line", "True", "tests/system/test_schema.py"),
    Mutant(SCHEMA, "(int, float, str)", "(int, str)", "tests/formats/test_config.py -k refused"),
    Mutant("minilora/formats/config_rope.py", "if len(factors) != head_dim // 2:", "if False:", "tests/formats/test_config.py -k refused"),
    Mutant("minilora/formats/config_rope.py", 'if rope["theta"] == 1:', "if False:", "tests/formats/test_config.py -k refused"),
    Mutant("minilora/formats/config_json.py", 'if window is None and "sliding_attention" in types:', "if False:", "tests/formats/test_config.py -k windows"),
    Mutant("minilora/formats/config_json.py", "if count > MAX_PARAMETERS:", "if False:", "tests/formats/test_config.py"),
    Mutant("minilora/formats/config_json.py", "    _check_code(fields[\"auto_map\"])\n", "", "tests/formats/test_config.py"),
    Mutant("minilora/adapters/file.py", "if value not in (None, False, [])", "if value", "tests/adapters/test_save_load.py"),
    Mutant("minilora/formats/weights.py", "if not torch.stack(torch.aminmax(weight)).isfinite().all():", "if False:", "tests/formats/test_weights.py"),
    Mutant(PICKLED, "weights_only=True, mmap", "weights_only=False, mmap", "tests/formats/test_pickled.py"),
    Mutant(PICKLED, "if torch.__version__ < _SAFE_SINCE:", "if False:", "tests/formats/test_pickled.py"),
    Mutant(PICKLED, "if entry.compress_type != zipfile.ZIP_STORED:", "if False:", "tests/formats/test_pickled.py"),
    Mutant(PICKLED, "if type(value) not in (Tensor, nn.Parameter):", "if False:", "tests/formats/test_pickled.py"),
    Mutant(PICKLED, "value.numel() * value.element_size() >", "False and", "tests/formats/test_pickled.py"),
    Mutant(PICKLED, "if not path.is_file():", "if False:", "tests/formats/test_pickled.py"),
    Mutant("minilora/formats/weights.py", "return None if self.prequantized else quant", "return quant", "tests/formats/test_prequantized.py"),
    Mutant("minilora/formats/bnb_int8.py", "layout.item() == 0", "layout.item() < 4", "tests/formats/test_prequantized.py"),
    Mutant("minilora/run/saved_state.py", "if all(part.isfinite().all() for part in parts.values()):", "if True:", "tests/run/test_checkpoints.py -k wrong_contents"),
    Mutant(FILES, "if len(fields) < len(pairs):", "if False:", "tests/system/test_files.py"),
    Mutant(FILES, "    if not path.is_file():\n", "    if False:\n", "tests/system/test_files.py"),
    # ---- hangs and memory ----
    Mutant("minilora/system/patterns.py", "timeout=SECONDS", "timeout=60", "tests/system/test_patterns.py"),
    Mutant("minilora/data/jinja_sandbox.py", "_set_timer(min(seconds_left, SECONDS))", "_set_timer(60)", "tests/data/test_template_process.py"),
    Mutant("minilora/data/jinja_sandbox.py", '"NOFILE": 3', '"NOFILE": 99', "tests/data/test_template_process.py"),
    Mutant("minilora/data/jinja_sandbox.py", '"AS": MEMORY, ', "", "tests/data/test_template_process.py"),
    Mutant("minilora/data/template_process.py", 'return _renderer(os.getpid()).ask(source, {"messages"', 'return _renderer(0).ask(source, {"messages"', "tests/data/test_template_process.py"),
    Mutant("minilora/run/yaml_file.py", "if count > MOST_VALUES:", "if False:", "tests/run/test_yaml_file.py"),
    Mutant("minilora/run/yaml_file.py", "if level + height > DEEPEST:", "if False:", "tests/run/test_yaml_file.py"),
    Mutant("minilora/data/file_formats.py", "if blank > MOST_BLANK_LINES", "if False and blank > MOST_BLANK_LINES", "tests/data/test_file_formats.py"),
    Mutant("minilora/data/file_formats.py", "if expanded > max(", "if expanded > 99 * max(", "tests/data/test_file_formats.py"),
    Mutant("scripts/sweep.py", "> MOST_RUNS:", "> 10 * MOST_RUNS:", "tests/scripts/test_sweep.py"),
    # ---- numbers ----
    Mutant("minilora/lora.py", "nn.init.kaiming_uniform_(A, a=math.sqrt(5))", "nn.init.kaiming_uniform_(A)", "tests/core/test_lora.py -k uniformly"),
    Mutant("minilora/lora.py", "nn.init.kaiming_uniform_(A, a=math.sqrt(5))", "nn.init.normal_(A, std=(3 * in_features) ** -0.5)", "tests/core/test_lora.py -k uniformly"),
    Mutant("minilora/adapted.py", "        self.merged = None if self.merged == name else self.merged\n", "", "tests/core/test_lora.py -k bars_no_other"),
    Mutant(DORA, "squares * _EPS + _TINY", "squares * 0 + _TINY", "tests/core/test_dora.py -k root_of_2"),
    Mutant(DORA, "squares * _EPS + _TINY", "squares * _EPS", "tests/core/test_dora.py -k row_of_zeros"),
    Mutant(DORA, "torch.linalg.vector_norm(V, dim=1).clamp_min(_TINY)", "torch.linalg.vector_norm(V, dim=1)", "tests/core/test_dora.py -k row_of_zeros"),
    Mutant(DORA, "(dy.float() * y)", "(dy * y)", "tests/core/test_dora.py -k magnitudes_is_summed"),
    Mutant("minilora/quantization.py", "x = weight.detach().contiguous().view(-1)", "x = weight.contiguous().view(-1)", "tests/core/test_quantization.py -k without_a_graph"),
    Mutant("minilora/backend/rerun.py", "torch.autocast(device, dtype, enabled, self.autocast_cache)", "torch.autocast(device, dtype, enabled)", "tests/core/test_recompute.py -k autocasts_cache"),
    # ---- processes and files ----
    Mutant("minilora/system/locks.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "tests/system/test_locks.py"),
    Mutant("minilora/system/locks.py", "if _is_still(descriptor, path):", "if True:", "tests/system/test_locks.py"),
    Mutant("minilora/system/locks.py", 'getattr(os, "O_NOFOLLOW", 0)', "0", "tests/system/test_locks.py"),
    Mutant("minilora/system/outputs.py", "            _finish_swap(output)\n", "", "tests/system/test_outputs.py"),
    Mutant("minilora/system/outputs.py", "elif not _exchange(new, output):", "else:", "tests/system/test_outputs.py"),
    Mutant("minilora/system/outputs.py", "if os.path.lexists(workshop) and not _is_mine(workshop):", "if False:", "tests/system/test_outputs.py"),
    Mutant("minilora/system/children.py", "ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)", "pass", "tests/system/test_signals.py"),
    Mutant("minilora/system/signals.py", "ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN", "ignored = hangup is None", "tests/system/test_signals.py"),
    Mutant("minilora/system/cache.py", "if status.st_uid not in (0, os.getuid()):", "if False:", "tests/system/test_cache.py"),
    Mutant("minilora/system/cache.py", "if _others_may_write(status) and (part == directory or", "if _others_may_write(status) and (False and", "tests/system/test_cache.py"),
    Mutant("minilora/backend/library.py", 'is_ours and path.stem.rpartition("-")[2] == hashlib', 'is_ours or path.stem.rpartition("-")[2] == hashlib', "tests/core/test_library.py"),
    Mutant("minilora/backend/library.py", "if not stat.S_ISREG(status.st_mode) or", "if", "tests/core/test_library.py"),
    # ---- processes that divide a model ----
    Mutant(GATHERING, "    opened()\n", "", "tests/parallel/test_training.py"),
    Mutant(GATHERING, "y.register_hook(opened)", "pass", "tests/parallel/test_training.py"),
    Mutant(GATHERING, "self._close(other)", "pass", "tests/parallel/test_memory.py"),
    Mutant(LOADING, "gathered[: -(-n // layout.blocksize)]", "gathered", "tests/parallel/test_loading.py"),
    Mutant(LOADING, "name, first, -(-end // width))", "name, 0, -(-end // width))[first:]", "tests/parallel/test_loading.py"),
    Mutant("minilora/run/random_state.py", "(seed, step, number)).generate", "(seed, step)).generate", "tests/run/test_random_state.py"),
]  # fmt: skip


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests pass with the fault in."""
    file = copy / mutant.file
    right = file.read_text(encoding="utf-8")
    file.write_text(right.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
    try:
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode not in (0, 1):  # neither passed nor failed
            raise RuntimeError(f"{mutant}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0
    except subprocess.TimeoutExpired:  # a hang is noticed
        return False
    finally:
        file.write_text(right, encoding="utf-8")


def main() -> None:
    workers = min(2, os.cpu_count() or 1)
    chosen = [
        mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in repr(mutant) for word in sys.argv[1:])
    ]
    with tempfile.TemporaryDirectory() as directory:
        copies = [Path(directory) / str(i) for i in range(workers)]
        for copy in copies:
            copy.mkdir()
            for name in COPIED:
                source = ROOT / name
                shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)

        def run(i: int) -> list[Mutant]:
            found = []
            for mutant in chosen[i::workers]:
                alive = survives(mutant, copies[i])
                print("SURVIVED" if alive else "noticed ", mutant.file, repr(mutant.new)[:80], flush=True)
                found += [mutant] if alive else []
            return found

        with ThreadPoolExecutor(workers) as pool:
            alive = [mutant for part in pool.map(run, range(workers)) for mutant in part]
    print(f"\n{len(chosen)} mutants, {len(alive)} survived")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
