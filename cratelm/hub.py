"""Write and upload directories for the Hugging Face hub: model, tokenizer and a model card with the results."""

import tempfile
from pathlib import Path

from cratelm.data.special_tokens import SpecialTokens, special_tokens
from cratelm.errors import CrateError
from cratelm.model.weights import find_model, load, save_model
from cratelm.report.export.model_card import model_card, run_of
from cratelm.rundir import atomic_path


def write_directory(source: str | Path, folder: Path, *, title: str | None = None) -> None:
    """Write the model and tokenizer of a run, with the model card as README.md."""
    model, tokenizer = load(source)
    directory = find_model(source)
    special = SpecialTokens() if tokenizer is None else special_tokens(tokenizer, directory, post_processor=False)
    begin = special.begin[0] if special.begin else None
    with atomic_path(folder) as temporary:
        save_model(model, temporary, tokenizer, begin=begin, end=special.end)
        card = model_card(run_of(directory) or temporary, title=title or folder.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def push_to_hub(
    source: str | Path, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> str:  # fmt: skip
    """Upload the model of a run with its model card; returns the URL."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_directory(source, folder, title=repo_id)
        return upload(folder, repo_id, private=private, token=token)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload model",
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Upload a folder to a repository on the hub, which is created if it does not exist; returns the URL."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise CrateError("uploading needs huggingface_hub. Hint: pip install 'cratelm[hf]'") from None
    hub = HfApi(token=token)
    try:
        name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, create_pr=create_pr, revision=revision
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CrateError(
            f"{repo_id} could not be uploaded ({reason}). Check the name, and log in: hf auth login"
        ) from None
    return str(done)
