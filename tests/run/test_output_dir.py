"""output_dir: a run deletes what another run has left there, and nothing else."""


def test_the_half_written_files_of_a_killed_run_go_and_those_of_the_user_stay(train, tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    for name in ("adapter_model.safetensors", "tokenizer.json", "training_config.yaml", "mine"):
        (directory / f"{name}.part").write_text("half")
    train()
    assert [path.name for path in directory.glob("*.part")] == ["mine.part"]
    assert not (directory / ".lock").exists()
