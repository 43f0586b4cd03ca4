"""The page that finds anomalies in a scan which a visitor uploads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import nibabel as nib

from .heads import generate_head
from .maps import find_anomalies, list_models
from .pages import Sessions, gr, write_facts, write_frame, write_note


_WELCOME = """# Anomaly maps
Choose a scan of the head, or the generated one, and a checkpoint. The scan stays on the computer that serves this page,
and is deleted there when you close it. **Research use, not a medical device.**"""


def fill_maps(page: gr.Blocks, models: Sequence[str] = ()) -> None:
    """
    Fills a page, or a part of it, with what finds anomalies.

    Args:
        page (`gr.Blocks`): The page.
        models (sequence of `str`): Pipelines that can be chosen beside the shipped ones: folders, or ids of the Hub.
    """
    choices = list_models(list(models))
    if not choices:
        raise FileNotFoundError("This installation has no checkpoints: name one by `--model`.")
    sessions = Sessions()
    gr.Markdown(_WELCOME)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = gr.File(
                label="Scan: NIfTI or picture, one file for each modality",
                file_count="multiple",
                elem_id="scan",
            )
            example = gr.Button("Take a generated head with a tumour", elem_id="example")
            model = gr.Dropdown(choices, value=choices[0], label="Checkpoint", elem_id="model")
            with gr.Accordion("More", open=False):
                brain = gr.File(label="Brain mask, where the checkpoint does not find it itself", elem_id="brain")
                seed = gr.Number(0, label="Seed of the draws", precision=0, minimum=0)
            start = gr.Button("Find anomalies", variant="primary", elem_id="start")
            note = gr.HTML(elem_id="note", min_height=120)
            archive = gr.DownloadButton("Download the results (ZIP)", visible=False, elem_id="archive")
        with gr.Column(scale=3, min_width=480):
            viewer = gr.HTML(elem_id="viewer")

    def take_head(request: gr.Request) -> list[str]:
        folder = sessions.new_folder(request)
        folder.mkdir(parents=True)
        nib.save(generate_head("flair", "tumour", skull=True).image, folder / "generated_flair.nii.gz")
        return [str(folder / "generated_flair.nii.gz")]

    def find(uploaded, chosen, mask, number, request: gr.Request, progress=gr.Progress(track_tqdm=True)):  # noqa: B008 (gradio finds it so)
        folder = sessions.new_folder(request)
        try:
            found = find_anomalies(
                uploaded or [],
                chosen,
                folder,
                brain=mask,
                seed=int(number or 0),
                say=lambda text: progress(None, desc=text),
            )
        except Exception as error:  # noqa: BLE001 (whatever is wrong with a file, the page says it and stays)
            shutil.rmtree(folder, ignore_errors=True)
            text = " ".join(str(error).split()).replace(f"{folder / 'given'}/", "")
            return write_note(text or type(error).__name__, error=True), gr.update(visible=False), ""
        shown = gr.update(value=str(found.archive), visible=True)
        return write_facts(found.facts), shown, write_frame(found.page, "Viewer")

    files.upload(sessions.keep, files, show_progress="hidden")
    brain.upload(sessions.keep, brain, show_progress="hidden")
    example.click(take_head, None, files)
    start.click(find, [files, model, brain, seed], [note, archive, viewer], show_progress_on=note)
    page.unload(sessions.forget)
