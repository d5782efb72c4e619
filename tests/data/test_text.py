"""Loading text: every kind of file, what errors say, and how the hub is used, reached and done without."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from detent.data import builtin, files, hub, text
from detent.data.documents import Conversation, render
from detent.data.text import TextSource, load_texts
from detent.errors import DetentError
from tiny_language_model import make_tokenizer

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]


def write(path: Path, content: str | bytes | object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def builtin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the texts that ship with the package."""
    folder = tmp_path / "package"
    (folder / "texts").mkdir(parents=True)
    write(folder / "texts" / "calibration.txt", "One.\n\nTwo.\n")
    write(folder / "texts" / "evaluation.txt", "Three.\n\nFour.\n")
    monkeypatch.setattr(builtin, "_data_dir", lambda: folder)


class TestLocalFiles:
    def test_txt_is_paragraphs_for_calibration(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "\n\nOne\nmore.\n \t\n\nTwo.\n")
        source = load_texts(path, "calibration")
        assert [str(paragraph).strip() for paragraph in source.texts] == ["One\nmore.", "Two."]
        assert source.joined
        assert source.description == str(path)
        assert not source.builtin
        assert source.notice is None

    def test_txt_is_whole_for_evaluation(self, tmp_path: Path) -> None:
        content = " = Title = \n\n\n Body \n"
        path = write(tmp_path / "a.txt", content)
        assert load_texts(str(path), "evaluation").joined_text() == content

    def test_txt_line_ends_and_byte_order_mark(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo.")
        assert [*load_texts(path, "calibration").texts] == ["One.", "Two."]

    def test_home_is_understood(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        write(tmp_path / "a.json", ["One."])
        assert [*load_texts("~/a.json", "calibration").texts] == ["One."]

    @pytest.mark.parametrize(
        "content",
        [
            ["One.", "Two."],
            [{"text": "One."}, {"content": "Two."}],
            [{"prompt": "One.", "id": 3}, "Two."],
            {"version": 1, "stories": ["One.", {"text": "Two."}]},
            ["", "One.", {"text": None}, " \n", "Two."],
        ],
    )
    def test_json(self, tmp_path: Path, content: object) -> None:
        source = load_texts(write(tmp_path / "a.json", content), "calibration")
        assert [*source.texts] == ["One.", "Two."]
        assert not source.joined

    def test_json_with_a_line_for_each_object(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", '{"text": "One."}\n{"text": "Two."}\n')
        assert [*load_texts(path, "calibration").texts] == ["One.", "Two."]

    def test_jsonl(self, tmp_path: Path) -> None:
        lines = [
            '"One."',
            "",
            json.dumps({"text": "Two\u2028 still two."}, ensure_ascii=False),
            '{"content": "Three."}',
        ]
        path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
        assert [*load_texts(path, "calibration").texts] == ["One.", "Two\u2028 still two.", "Three."]

    def test_limit_takes_the_first(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", ["One.", "Two.", "Three."])
        assert [*load_texts(path, "calibration", limit=2).texts] == ["One.", "Two."]

    def test_chats(self, tmp_path: Path) -> None:
        parts = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]}]
        path = write(tmp_path / "a.json", [{"messages": CHAT}, {"messages": parts}])
        assert [*load_texts(path, "calibration").texts] == [
            Conversation((("user", "Hello?"), ("assistant", "Hello."))),
            Conversation((("user", "What is this?"),)),
        ]

    @pytest.mark.parametrize("column", ["text", "only_text"])
    def test_parquet(self, tmp_path: Path, column: str) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": [1, 2, 3], column: ["One.", None, "Two."]}), tmp_path / "a.parquet")
        assert [*load_texts(tmp_path / "a.parquet", "calibration").texts] == ["One.", "Two."]

    def test_parquet_with_messages(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "a.parquet")
        (document,) = load_texts(tmp_path / "a.parquet", "calibration").texts
        assert document == Conversation((("user", "Hello?"), ("assistant", "Hello.")))


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"", "is empty"),
            ("a.txt", b" \n\n\t", "no usable text"),
            ("a.txt", b"ab\xff", "byte 2 is not valid UTF-8"),
            ("a.json", b"", "is empty"),
            ("a.json", b"[]", "no usable text"),
            ("a.json", b'["", {"text": null}]', "no usable text"),
            ("a.json", b'["One.",\n "Two"', r"is not JSON .line 2, column 7"),
            ("a.json", b'{"a": ["x"], "b": ["y"]}', "found 2 lists"),
            ("a.json", b"3", "expected a list of texts"),
            ("a.json", b'["One.", 3]', "entry 2: expected a string or an object .*found the number 3"),
            ("a.json", b'["One.", ["Two."]]', "entry 2: .*found a list"),
            ("a.json", b'[{"title": "x", "n": 1}]', "entry 1: the object has no 'text'.*'title', 'n'"),
            ("a.json", b'[{"text": 4}]', "entry 1, field 'text': expected a string, found the number 4"),
            ("a.json", b'["half \\ud800"]', "entry 1: character 5 is half of a surrogate pair"),
            ("a.json", b"[" * 100_000, "is not JSON|nested more than 64"),
            ("a.json", b'[{"messages": []}]', "entry 1: 'messages' must be a list"),
            ("a.json", b'[{"messages": [{"content": "x"}]}]', "entry 1, message 1: expected an object with a 'role'"),
            ("a.json", b'[{"messages": [{"role": "user", "content": 1}]}]', "message 1, field 'content'"),
            ("a.jsonl", b'{"text": "One."}\n\n{"text": }\n', "line 3 is not JSON"),
            ("a.jsonl", b'{"text": "One."}\ntrue\n', "line 2: .*found a true/false value"),
            ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
            ("a.csv", b"text\nOne.", "must end in one of .txt, .json, .jsonl, .parquet, found the suffix '.csv'"),
            ("a", b"One.", "found no suffix"),
        ],
    )
    def test_message(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        path = write(tmp_path / name, content)
        with pytest.raises(DetentError, match=message) as error:
            load_texts(str(path), "calibration")
        assert str(path) in str(error.value)

    @pytest.mark.parametrize("name", ["missing.json", "./missing", "data/missing.txt"])
    def test_missing(self, name: str) -> None:
        with pytest.raises(DetentError, match="does not exist"):
            load_texts(name, "calibration")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DetentError, match="is not a file"):
            load_texts(tmp_path, "calibration")

    def test_parquet_without_a_clear_column(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"a": ["x"], "b": ["y"]}), tmp_path / "a.parquet")
        with pytest.raises(DetentError, match="which column holds the text; it has the columns a, b"):
            load_texts(tmp_path / "a.parquet", "calibration")

    def test_limit_must_be_positive(self, tmp_path: Path) -> None:
        with pytest.raises(DetentError, match="at least 1, found 0"):
            load_texts(write(tmp_path / "a.json", ["One."]), "calibration", limit=0)


class TestNames:
    @pytest.mark.parametrize(("name", "near"), [("pilevall", "pileval"), ("scienceqa", "ScienceQA")])
    def test_unknown_name_suggests(self, name: str, near: str) -> None:
        with pytest.raises(DetentError, match=f"did you mean '{near}'") as error:
            load_texts(name, "calibration")
        assert all(known in str(error.value) for known in hub.HUB_DATASETS)
        assert ".jsonl" in str(error.value)

    def test_builtin(self, builtin_files: None) -> None:
        source = load_texts("builtin", "calibration")
        assert [str(paragraph).strip() for paragraph in source.texts] == ["One.", "Two."]
        assert source.builtin
        assert source.joined
        assert source.notice is None
        assert load_texts("builtin", "evaluation").joined_text() == "Three.\n\nFour.\n"

    def test_missing_package_data_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(builtin, "_data_dir", lambda: tmp_path)
        with pytest.raises(DetentError, match="evaluation text is missing from this installation"):
            builtin.builtin_text("evaluation")
        with pytest.raises(DetentError, match="sample model is missing from this installation"):
            builtin.sample_model_dir()


class TestNoNetwork:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(hub, "unreachable_reason", lambda: "huggingface.co cannot be reached")

    @pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
    def test_nothing_named_uses_the_builtin_text_and_says_so(self, purpose: Any, builtin_files: None) -> None:
        source = load_texts(None, purpose, limit=4)
        assert source.builtin
        assert source.notice is not None
        assert "huggingface.co cannot be reached" in source.notice
        assert "built-in text" in source.notice
        assert source.notice.endswith(" as dataset" if purpose == "calibration" else " as eval_dataset")

    @pytest.mark.parametrize("name", ["pileval", "HuggingFaceH4/ultrachat_200k", "org/texts"])
    def test_named_is_an_error(self, name: str) -> None:
        with pytest.raises(DetentError, match="cannot be reached; name a local file") as error:
            load_texts(name, "calibration", limit=4)
        assert "leave out dataset" in str(error.value)

    def test_cached_data_set_works(self, tmp_path: Path) -> None:
        fill_cache(tmp_path, "org/texts", ["One.", "", "Two.", "Three."])
        source = load_texts("org/texts", "calibration", limit=2)
        assert [*source.texts] == ["One.", "Two."]
        assert source.description == "org/texts"

    def test_the_package_setting_is_restored(self) -> None:
        import datasets

        before = datasets.config.HF_HUB_OFFLINE
        with pytest.raises(DetentError):
            load_texts("pileval", "calibration")
        assert before == datasets.config.HF_HUB_OFFLINE

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch, builtin_files: None) -> None:
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(DetentError, match=r'pip install "detent\[datasets\]"'):
            load_texts("pileval", "calibration")
        assert load_texts(None, "calibration").builtin


def fill_cache(tmp_path: Path, name: str, texts: list[str]) -> None:
    """Put a data set into the cache of `datasets`, as if it had been downloaded."""
    from datasets.packaged_modules.json.json import Json

    path = write(tmp_path / "rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    # "local" and the folder it makes are replaced by what they would be for a data set from the hub.
    builder = Json(
        cache_dir=str(tmp_path / "prepared"),
        dataset_name=name.split("/")[-1],
        hash="0",
        data_files={"train": str(path)},
    )
    builder.download_and_prepare()
    folder = tmp_path / "cache" / name.replace("/", "___") / "default" / "0.0.0" / "0"
    shutil.copytree(builder.cache_dir, folder)
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    write(folder / "dataset_info.json", {**info, "config_name": "default"})


class TestHub:
    """The hub replaced by a function that gives small data sets and notes what it was asked for."""

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        datasets = pytest.importorskip("datasets")
        calls: list[dict[str, Any]] = []
        rows: dict[str, dict[str, list[Any]]] = {
            "mit-han-lab/pile-val-backup": {"text": [f"pile {i}" for i in range(200)]},
            "Salesforce/wikitext": {"text": ["", " = T = \n", "", " body \n"]},
            "HuggingFaceH4/ultrachat_200k": {
                "prompt": ["p"] * 9,
                "messages": [[{"role": "user", "content": str(i)}] for i in range(9)],
            },
            "derek-thomas/ScienceQA": {"lecture": ["L", ""], "question": ["Q1", "Q2"], "solution": ["S", None]},
            "abisee/cnn_dailymail": {"article": ["A", "B"], "highlights": ["a", "b"]},
            "org/odd": {"id": [1], "body": ["odd"]},
            "org/unclear": {"a": ["x"], "b": ["y"]},
        }

        def load_dataset(path: str, name: str | None, split: str | None, streaming: bool = False, **more: Any) -> Any:
            assert not more, "nothing else may be asked of the package, remote code least of all"
            if datasets.config.HF_HUB_OFFLINE:
                raise ConnectionError("not in the cache")
            calls.append({"path": path, "name": name, "split": split, "streaming": streaming})
            if path == "org/gone":
                raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/gone' doesn't exist on the Hub.")
            data = datasets.Dataset.from_dict(rows[path])
            data = data.to_iterable_dataset() if streaming else data
            return data if split else {"other": None, "validation": data}

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(hub, "unreachable_reason", lambda: None)
        return calls

    def test_pileval_reads_only_the_first_texts(self, calls: list[dict[str, Any]]) -> None:
        source = load_texts("pileval", "calibration", limit=3)
        assert [*source.texts] == ["pile 0", "pile 1", "pile 2"]
        assert calls == [
            {"path": "mit-han-lab/pile-val-backup", "name": None, "split": "validation", "streaming": True}
        ]
        assert "mit-han-lab/pile-val-backup" in source.description

    def test_defaults(self, calls: list[dict[str, Any]]) -> None:
        source = load_texts(None, "calibration", limit=2)
        assert [*source.texts] == ["pile 0", "pile 1"]
        assert source.notice is None
        assert load_texts(None, "evaluation").joined_text() == "\n\n".join(["", " = T = \n", "", " body \n"])
        assert calls[-1]["split"] == "test"
        assert calls[-1]["name"] == "wikitext-2-raw-v1"

    def test_wikitext_for_calibration_skips_blank_rows(self, calls: list[dict[str, Any]]) -> None:
        assert [*load_texts("wikitext", "calibration", limit=9).texts] == [" = T = \n", " body \n"]
        assert calls[-1]["split"] == "train"

    def test_benchmark_rules(self, calls: list[dict[str, Any]]) -> None:
        import datasets

        short = load_texts("pileval_for_awq_benchmark", "calibration", limit=3)
        expected = datasets.Dataset.from_dict({"text": [f"pile {i}" for i in range(200)]}).shuffle(seed=42)["text"]
        assert short.sampling == "short_documents"
        assert short.texts[:5] == list(expected[:5])
        assert len(short.texts) == 200
        assert short.texts[-1] == expected[199]
        assert load_texts("wikitext_for_gptq_benchmark", "calibration", limit=3).sampling == "random_windows"
        assert not any(call["streaming"] for call in calls)

    def test_ultrachat_is_shuffled_conversations(self) -> None:
        texts = load_texts("HuggingFaceH4/ultrachat_200k", "calibration", limit=4).texts
        assert len(texts) == 4
        assert all(isinstance(document, Conversation) for document in texts)
        assert [*texts] != [Conversation((("user", str(i)),)) for i in range(4)]

    def test_fields(self) -> None:
        assert [*load_texts("ScienceQA", "calibration", limit=2).texts] == ["L\nQ1\nS", "Q2"]
        assert [*load_texts("cnn_dailymail", "calibration", limit=1).texts] == ["A"]

    def test_other_data_sets(self, calls: list[dict[str, Any]]) -> None:
        assert [*load_texts("org/odd", "calibration", limit=2).texts] == ["odd"]
        assert calls[-1]["split"] is None
        with pytest.raises(DetentError, match="which column holds the text"):
            load_texts("org/unclear", "calibration", limit=2)
        with pytest.raises(DetentError, match="doesn't exist on the Hub"):
            load_texts("org/gone", "calibration", limit=2)

    def test_evaluation_of_another_data_set_is_bounded(self) -> None:
        source = load_texts("pileval", "evaluation")
        assert len(source.texts) == hub.EVALUATION_DOCUMENTS
        assert f"first {hub.EVALUATION_DOCUMENTS} texts" in source.description


class TestReachability:
    @pytest.fixture(autouse=True)
    def clean_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)

    def test_listening_and_closed_ports(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setenv("HF_ENDPOINT", f"http://{address}")
            assert hub.unreachable_reason() is None
        assert hub.unreachable_reason() == "127.0.0.1 cannot be reached"

    def test_a_proxy_is_what_must_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
            assert hub.unreachable_reason() is None

    @pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
    def test_offline_variables(self, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
        monkeypatch.setenv(variable, "1")
        assert hub.unreachable_reason() == f"{variable} is set"

    def test_bad_endpoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "nonsense")
        assert "names no host" in str(hub.unreachable_reason())


class TestRendering:
    chat = Conversation((("user", "Hello?"), ("assistant", "Hello.")))

    def test_chat_template(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        assert render(self.chat, tokenizer) == ("<user>Hello?<assistant>Hello.", False)

    def test_without_a_template(self) -> None:
        assert render(self.chat, make_tokenizer()) == ("Hello?\nHello.", True)
        assert TextSource([self.chat, "Bye."], "x").joined_text() == "Hello?\nHello.\n\nBye."

    def test_refusal(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
        with pytest.raises(DetentError, match="roles user, assistant: Roles must alternate"):
            render(self.chat, tokenizer)

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{{ 1 / 0 }}", "division by zero"),
            ("{{ messages[99].content.x }}", "no element 99"),
            ("{{ messages + 1 }}", "concatenate list"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{% for a in messages %}", "Unexpected end"),
            ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "may not end"),
            ("{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}", "may not end"),
        ],
    )
    def test_templates_that_fail_or_do_not_end(self, template: str, words: str) -> None:
        tokenizer, tracer = make_tokenizer(), sys.gettrace()
        tokenizer.chat_template = template
        with pytest.raises(DetentError, match=f"chat template fails .*roles user, assistant: .*{words}"):
            render(self.chat, tokenizer)
        assert sys.gettrace() is tracer


class TestShareGPT:
    CHAT = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi!"}]

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_speakers_become_roles(self, name: str, tmp_path: Path) -> None:
        path = write(tmp_path / name, json.dumps({"id": "x", "conversations": self.CHAT}).encode())
        wanted = Conversation((("system", "Be kind."), ("user", "Hi?"), ("assistant", "Hi!")))
        assert files.read_documents(path) == [wanted]

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": ["x"], "conversations": [self.CHAT]}), tmp_path / "a.parquet")
        assert [d.messages[1] for d in files.read_documents(tmp_path / "a.parquet")] == [("user", "Hi?")]

    def test_messages_under_this_name(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", [{"conversations": [{"role": "user", "content": "Hi?"}]}])
        assert files.read_documents(path) == [Conversation((("user", "Hi?"),))]

    def test_what_is_neither(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", [{"conversations": [{"from": "human", "content": "Hi?"}]}])
        with pytest.raises(DetentError, match="entry 1, message 1: .*'from' string and a 'value' or a 'role'"):
            files.read_documents(path)


def test_table_names_are_the_ones_the_guide_lists() -> None:
    assert set(hub.HUB_DATASETS) == {
        "pileval",
        "wikitext",
        "pileval_for_awq_benchmark",
        "wikitext_for_gptq_benchmark",
        "HuggingFaceH4/ultrachat_200k",
        "ScienceQA",
        "cnn_dailymail",
    }
    assert set(text.DEFAULT_SOURCES.values()) <= set(hub.HUB_DATASETS)
