"""What does not hold yet of tests/test_layout.py; nothing is added here, and the file goes with its last entry."""

TODAY: dict[str, set[str]] = {
    "circle": set(),
    "upwards": set(),
    "cli": set(),
    "name": {
        "bench/conftest.py",
        "bench/test_step.py",
        "tests/bench/test_step.py",
        "tests/conftest.py",
    },
    "long": {
        "tests/conditioning/test_conditioning.py",
    },
    "arguments": {
        "emf/cli/data.py cache",
        "emf/cli/evaluate.py _run",
        "emf/cli/evaluate.py dpg",
        "emf/cli/evaluate.py geneval",
        "emf/cli/evaluate.py hps",
        "emf/cli/generate.py generate",
        "emf/cli/planning.py plan",
        "emf/cli/weights.py convert",
        "emf/evaluate/pictures.py draw_and_score",
        "emf/flow.py meanflow_loss",
        "emf/model/layers.py __init__",
        "emf/sample/emf_pipeline.py __call__",
        "emf/train/loop.py run",
        "tests/tiny.py ta_tok_file",
    },
}
