"""Files of every format, from disk, addresses and the hub; errors name the file and the line."""

import base64
import csv
import gzip
import http.server
import io
import json
import sys

import fsspec.registry  # noqa: F401
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.servers import serving

from minilora import UserError
from minilora.data.readers import read_records

RECORDS = [{"prompt": "a", "completion": "b"}, {"prompt": 'é,\n"x"', "completion": ""}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
CSV = 'prompt,completion\na,b\n"é,\n""x""",\n'


def columns(place) -> list[dict]:
    return [record for _, record in read_records(place)]


# Formats


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        # A byte order mark, Windows line ends and empty lines.
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n")),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=2)),
        ("a.json", json.dumps({"version": [1, 2], "data": RECORDS}, indent=2)),
        ("a.json", '{"data": ' + json.dumps(RECORDS).replace("},", "},\n") + ', "empty": []\n}'),
        ("a.json", LINES),
        ("a.csv", CSV),
        ("a.tsv", CSV.replace("prompt,", "prompt\t").replace("a,b", "a\tb").replace('",\n', '"\t\n')),
    ],
)
def test_every_format_gives_the_same_records(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert columns(tmp_path / name) == RECORDS
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert columns(tmp_path / f"{name}.gz") == RECORDS


def test_parquet_gives_the_same_records_and_nested_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="an extra: reads Parquet")
    from pyarrow import parquet

    records = [record | {"messages": [{"role": "user", "content": "a"}]} for record in RECORDS]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet") == [
        (f"{tmp_path}/a.parquet, row {i}", r) for i, r in enumerate(records, start=1)
    ]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        read_records(tmp_path / "a.parquet")


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_of_both_formats_give_the_same_records(tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow", reason="an extra: reads Arrow")
    table = pyarrow.Table.from_pylist(RECORDS * 400)
    write = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with write(tmp_path / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text('{"_split": "train"}')
    assert columns(tmp_path) == RECORDS * 400  # as datasets.save_to_disk lays them down
    path = tmp_path / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="is not a whole Arrow file"):
        read_records(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match=r"a.csv has two columns 'text'; rename or remove one"):
        read_records(tmp_path / "a.csv")
    pyarrow = pytest.importorskip("pyarrow", reason="an extra: reads Parquet")
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match=f"{name} has two columns 'text'"):
            read_records(tmp_path / name)


@pytest.mark.parametrize("text", [json.dumps(RECORDS), "\n" + json.dumps(RECORDS, indent=2)])
def test_a_json_list_in_a_jsonl_file_is_told(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match="holds one JSON list, .* let its name end in .json"):
        read_records(tmp_path / "a.jsonl")


@pytest.fixture(scope="module")
def parquet_bytes():
    pyarrow = pytest.importorskip("pyarrow", reason="an extra: reads Parquet")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS * 3), file)
    return file.getvalue()


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parquet_with_a_wrong_byte_is_read_or_refused_in_one_line(parquet_bytes, tmp_path, data):
    place, value = data.draw(st.integers(0, len(parquet_bytes) - 1)), data.draw(st.integers(0, 255))
    (tmp_path / "a.parquet").write_bytes(parquet_bytes[:place] + bytes([value]) + parquet_bytes[place + 1 :])
    try:
        assert all(isinstance(record, dict) for record in columns(tmp_path / "a.parquet"))
    except UserError as error:
        assert "a.parquet" in str(error) and "\n" not in str(error)


def test_parquet_without_its_package_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'minilora\[parquet\]'"):
        read_records(tmp_path / "a.parquet")


def test_a_text_file_holds_documents_between_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\n\ntwo\n")
    place = tmp_path / "a.txt"
    assert read_records(place) == [
        (f"{place}, document 1", {"text": "one\nstill one"}),
        (f"{place}, document 2", {"text": "two"}),
    ]


lines = st.text(alphabet="ab é", min_size=1).filter(str.strip)
blank = st.text(alphabet=" \t\xa0", max_size=2)


@given(
    st.lists(st.lists(lines, min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(blank, min_size=1),
    st.data(),
)
def test_documents_are_the_same_whatever_ends_their_lines_and_stands_on_blank_ones(
    tmp_path_factory, documents, blanks, data
):
    end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    between = end + "".join(blank + end for blank in blanks)
    path.write_bytes((between.join(end.join(document) for document in documents) + end).encode())
    assert columns(path) == [{"text": "\n".join(document)} for document in documents]


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)  # Python 3.10 takes no NUL


@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=4))
def test_a_file_by_pythons_csv_writer_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("p", "q"), *rows])
    assert columns(path) == [{"p": p, "q": q} for p, q in rows]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", LINES + "{oops\n", "a.jsonl, line 3: not valid JSON"),
        ("a.json", '[{"prompt": "a"},\n oops]', "a.json: not valid JSON: Expecting value, line 2 column 2"),
        (
            "a.json",
            '{"prompt":\n "a"}',
            "a.json is an object and should hold one list of objects; there is no list in it",
        ),
        (
            "a.json",
            '{"train": [{}],\n "test": [{}], "n": 1}',
            "should hold one list of objects; lists lie under train, test;",
        ),
        (
            "a.json",
            '{"data": [1],\n "more": []}',
            "should hold one list of objects; lists lie under data, more; write that list",
        ),
        ("a.json", "5", "a.json: expected a list of objects, found int"),
        ("a.jsonl", LINES + "[" * 100_000, "a.jsonl, line 3: nested too deeply"),
        ("a.json", LINES + '{"a": ' * 100_000 + "}", "a.json, line 3: nested too deeply"),
        ("a.json", "[" * 100_000, "a.json: nested too deeply"),
        (
            "a.jsonl",
            LINES + '{"a": ' + "9" * 5000 + "}",
            "a.jsonl, line 3: more than can be read: a whole number in it has over",
        ),
        ("a.json", '[{"a": ' + "9" * 5000 + "}]", "a.json: more than can be read"),
        ("a.jsonl", LINES + "[1, 2]\n", "a.jsonl, line 3: expected an object with columns, found list"),
        ("a.csv", CSV + "a,b,c\n", "a.csv, line 5: more cells than the header has columns"),
        ("a.csv", CSV + 'a,"b\n', "a.csv, line 5: not valid CSV"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.txt", " \n\n ", "is empty"),
        ("a.csv", "prompt,completion\n", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.xlsx", "", "ends in '.xlsx'; supported: .jsonl, .json, .csv, .tsv, .parquet, .txt"),
        ("a.xlsx.gz", "", "ends in '.xlsx'; supported"),
        ("a.jsonl.gz", LINES, "is not a whole gzip file"),
        ("data", LINES, "ends in ''; supported"),
    ],
)
def test_malformed_files_are_refused_with_file_and_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_records(tmp_path / name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_cell_is_a_missing_column_and_long_cells_are_read(tmp_path):
    long = "x" * 200_000  # the csv module's own limit is 131,072
    (tmp_path / "a.csv").write_text(f"p,q\na\n{long},b\n")
    assert columns(tmp_path / "a.csv") == [{"p": "a"}, {"p": long, "q": "b"}]


def test_a_file_that_is_missing_a_directory_cut_short_or_not_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
        read_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="x.jsonl does not exist"):
        read_records(5000 * "x" + ".jsonl")
    with pytest.raises(UserError, match="no .jsonl, .json"):
        read_records(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8 text: .* at byte 12"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(UserError, match="is not a whole gzip file"):
        read_records(tmp_path / "a.json.gz")


# Addresses


@pytest.fixture(scope="module")
def server():
    """The address of a local web server with a few files, one of them behind a password."""
    files = {"/data/a.jsonl": LINES.encode(), "/data/a.csv.gz": gzip.compress(CSV.encode())}
    files |= {"/my%20d%C3%A4ta/a.jsonl": LINES.encode(), "/private/a.jsonl": LINES.encode()}
    password = "Basic " + base64.b64encode("me@home:sécret".encode()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found, given = files.get(self.path.partition("?")[0]), self.headers.get("Authorization")
            refused = self.path.startswith("/private") and given != password
            if self.path.startswith("/moved"):  # to a server that the password is not for
                self.send_response(302)
                self.send_header("Location", "/private/a.jsonl")
            else:
                self.send_response(401 if refused else 200 if found is not None else 404)
            self.end_headers()
            if refused:
                return
            self.wfile.write(found or b"")

        def log_message(self, *_):
            pass

    with serving(Handler) as running:
        yield running.address


def test_a_web_address_is_read_and_shown_without_its_signature(server):
    place = f"{server}/data/a.jsonl?signature=secret"
    assert read_records(place) == [
        (f"{server}/data/a.jsonl, line {i}", record) for i, record in enumerate(RECORDS, start=1)
    ]
    assert columns(f"{server}/data/a.csv.gz") == RECORDS


def test_a_web_address_may_hold_a_password_blanks_and_any_letter(server):
    host = server.removeprefix("http://")
    assert columns(f"http://me%40home:s%C3%A9cret@{host}/private/a.jsonl") == RECORDS
    assert read_records(f"http://me@home:sécret@{host}/private/a.jsonl#x")[0] == (
        f"{server}/private/a.jsonl, line 1",
        RECORDS[0],
    )
    for path in ("my däta/a.jsonl?q=ä b", "my%20d%C3%A4ta/a.jsonl"):
        assert columns(f"{server}/{path}") == RECORDS


def test_a_password_goes_to_no_server_that_an_address_points_to(server):
    with pytest.raises(UserError, match="the server answers 401") as error:
        read_records(f"http://me%40home:s%C3%A9cret@{server.removeprefix('http://')}/moved/a.jsonl")
    assert "cret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "http://me:secret@[::1/x.jsonl?key=secret",
            "http://[::1/x.jsonl is no valid address; write it as https://host/file",
        ),
        ("https://[secret@/x.jsonl", "https:///x.jsonl is no valid address; write it as https://host/file"),
        (
            "https://h:port/x.jsonl",
            "https://h:port/x.jsonl is no valid address; write it as https://host/file",
        ),
        ("{server}/private/a.jsonl", "/private/a.jsonl cannot be read: the server answers 401"),
        ("{server}/data/b.jsonl?key=secret", "/data/b.jsonl cannot be read: the server answers 404"),
        (
            "http://127.0.0.1:9/b.jsonl?key=secret",
            "http://127.0.0.1:9/b.jsonl cannot be read: Connection refused",
        ),
        ("http://me:secret@127.0.0.1:9/b.jsonl", "http://127.0.0.1:9/b.jsonl cannot be read"),
        ("https://no host/b.jsonl", "is no valid address; write it as https://host/file"),
        ("{server}/data", "ends in ''; supported"),
        ("mars://base/a.jsonl", "mars://base/a.jsonl: mars:// is not supported; supported: https, http, s3"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_without_its_secrets(server, address, said):
    with pytest.raises(UserError) as error:
        read_records(address.format(server=server))
    assert said in str(error.value) and "secret" not in str(error.value) and "\n" not in str(error.value)


def test_s3_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    imported = sys.modules["fsspec.registry"]._registry  # the file systems that fsspec has imported before
    monkeypatch.delitem(imported, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3://bucket/a.jsonl: .*pip install 'minilora\[s3\]'"):
        read_records("s3://bucket/a.jsonl")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one dataset, of the files that a test names; it replaces the calls to huggingface_hub."""
    import huggingface_hub

    def dataset(*names, listing=None, card=""):
        def list_repo_files(self, repo_id, repo_type):
            assert (repo_id, repo_type) == ("me/mine", "dataset")
            if listing is not None:
                raise listing
            return list(names)

        def hf_hub_download(repo_id, name, repo_type):
            assert (repo_id, repo_type) == ("me/mine", "dataset")
            path = tmp_path / "snapshot" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(card if name == "README.md" else json.dumps({"text": name}))
            return str(path)

        def snapshot_download(repo_id, repo_type, local_files_only):
            assert local_files_only
            for name in names:
                hf_hub_download(repo_id, name, repo_type)
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    monkeypatch.chdir(tmp_path)
    return dataset


@pytest.mark.parametrize(
    ("names", "place", "chosen"),
    [
        (["README.md", "a.jsonl"], "me/mine", ["a.jsonl"]),
        (
            ["data/train-0.jsonl", "data/train-1.jsonl", "data/test.jsonl"],
            "me/mine",
            ["data/train-0.jsonl", "data/train-1.jsonl"],
        ),
        (["train.jsonl", "dataset_infos.json", "sub/state.json"], "me/mine", ["train.jsonl"]),
        (["main/train.jsonl", "main/test.jsonl", "more/train.jsonl"], "me/mine/main", ["main/train.jsonl"]),
        (["main/train.jsonl", "main/test.jsonl"], "me/mine/main/test", ["main/test.jsonl"]),
        (["en/train.jsonl", "en-us/train.jsonl", "english.jsonl"], "me/mine/en", ["en/train.jsonl"]),
        (
            ["data/test-0.jsonl", "data/test-1.jsonl", "data/tests.jsonl"],
            "me/mine/data/test",
            ["data/test-0.jsonl", "data/test-1.jsonl"],
        ),
        (
            ["train.jsonl", "train.jsonl.gz", "train.json", "train.csv", "train.txt", "train.parquet"],
            "me/mine",
            ["train.jsonl"],
        ),
        (
            ["test.jsonl", "train-0.json", "train-1.json", "train.txt"],
            "me/mine",
            ["train-0.json", "train-1.json"],
        ),
        (["a.jsonl", "sub/b.jsonl"], "me/mine/a", ["a.jsonl"]),
    ],
)
def test_the_training_files_of_a_hub_dataset_are_read(hub, names, place, chosen):
    hub(*names)
    assert read_records(place) == [(f"me/mine/{name}, line 1", {"text": name}) for name in chosen]


def test_the_card_of_a_hub_dataset_names_the_files_of_each_split(hub):
    card = "---\nconfigs:\n- data_files:\n  - {split: train, path: a.jsonl}\n  - {split: test, path: b.jsonl}\n---\n"
    hub("README.md", "a.jsonl", "b.jsonl", "c.jsonl", card=card)
    assert columns("me/mine") == [{"text": "a.jsonl"}]
    assert columns("me/mine[test]") == [{"text": "b.jsonl"}]


def test_a_folder_is_a_dataset_like_one_on_the_hub(tmp_path):
    for name in ("train.jsonl", "test.jsonl", ".cache/train.jsonl", "note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert columns(tmp_path) == [{"text": "train.jsonl"}]
    assert columns(f"{tmp_path}[test]") == [{"text": "test.jsonl"}]


def test_a_hub_dataset_without_a_network_comes_from_the_cache(hub):
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub("train.jsonl", "test.jsonl", listing=OfflineModeIsEnabled("off"))
    assert columns("me/mine") == [{"text": "train.jsonl"}]


@pytest.mark.parametrize(
    ("names", "place", "said"),
    [
        (
            ["main/train.jsonl", "more/train.jsonl"],
            "me/mine",
            "holds several, in main, more; choose one, as in me/mine/main",
        ),
        (["README.md", "weights.safetensors"], "me/mine", "dataset me/mine: no .jsonl, .json"),
        (["train.jsonl"], "me/mine/main", "file is there in main"),
        (
            ["a.jsonl", "s/b.jsonl"],
            "me/mine",
            "in no folder, s; choose one, as in me/mine/s; or .* hf://datasets/me/mine/a.jsonl$",
        ),
    ],
)
def test_a_hub_dataset_in_which_there_is_no_one_choice_is_refused(hub, names, place, said):
    hub(*names)
    with pytest.raises(UserError, match=said):
        read_records(place)


def test_a_hub_that_does_not_answer_is_an_error_of_one_line(hub):
    from huggingface_hub import errors

    response = type("Response", (), {"status_code": 503, "headers": {}, "request": None})()
    failures = {
        "neither a file here nor a dataset at http": errors.RepositoryNotFoundError(
            "secret", response=response
        ),
        "cannot be fetched from http.*: the answer is 503": errors.HfHubHTTPError(
            "secret", response=response
        ),
        "cannot be fetched from http.*: HTTPError": errors.HTTPError("secret"),
        "it is not a hub id either": errors.HFValidationError("secret"),
        "cannot be fetched .*LocalEntryNotFoundError": errors.LocalEntryNotFoundError("secret"),
    }
    for said, failure in failures.items():
        hub(listing=failure)
        with pytest.raises(UserError, match=said) as error:
            read_records("me/mine")
        assert "secret" not in str(error.value) and "\n" not in str(error.value)
