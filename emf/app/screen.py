"""The app's page: what is asked on the left, what was drawn on the right, and below it all of a visit.

Texts, figures and colours are those of every page (emf.show.page); gradio makes the controls.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from emf.app.studio import EULER, FEW, MOST, Studio
from emf.app.visit import Desk, header, name_of, said
from emf.show import page

DIGITS = ("a red seven", "two blue threes", "a green four and a brown three", "a blue six to the left of a white zero")
NAMED = ("red apple", "a picture of bicycle", "grinning face emoji")
"""Of a world of named pictures, as its captions are (emf.data.gallery)."""
OTHERS = ("a red cube on a blue sphere", "a cat that reads a newspaper in the rain", "a lighthouse at dusk, in oils")
BLUE, LINE, GREY, SOFT, INK = "#0072b2", "#dde1e7", "#59616e", "#f2f4f7", "#1d2430"  # of emf.show.page

CSS = f"""{page.CSS}
body {{ max-width: none; padding: 0 }}
.gradio-container {{ width: 100% !important; max-width: 84rem !important; margin: 0 auto !important;
  padding: 1rem !important }}
.gradio-container main, .gradio-container .main, .gradio-container .wrap {{ min-width: 0; max-width: 100% }}
.gradio-container .prose p, .gradio-container .prose h1 {{ max-width: none }}
.gradio-container .html-container {{ padding: 0 }}
#gallery .grid-wrap {{ min-height: 0; max-height: 32rem; padding-top: 2.4rem }}
#steps label, #euler label {{ padding: .3rem .45rem }} #steps .wrap, #euler .wrap {{ gap: .3rem }}
.drawn pre {{ white-space: pre-wrap; overflow-wrap: anywhere }} .drawn h2 {{ margin: 0 0 .6rem }}
.drawn .plots {{ grid-template-columns: repeat(var(--columns), minmax(7.5rem, 1fr)); overflow-x: auto }}
.drawn figure img, .drawn .waiting {{ width: 100%; max-width: none; margin: 0; border-radius: 6px }}
.drawn.pixels figure img {{ image-rendering: pixelated }}
.drawn .waiting {{ aspect-ratio: 1; background: #eef0f3; color: {GREY}; display: grid; place-items: center }}
@media (max-width: 48rem) {{ #desk {{ flex-direction: column }} #desk > * {{ width: 100%; min-width: 0 !important }}
  .drawn .plots {{ grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)) }} }}
"""
LIGHT = "() => document.body.classList.remove('dark')"
"""The pages have one look, by day and by night."""


def theme() -> gr.themes.Base:
    """The look of emf.show.page: its colours, and the fonts of the reader's own machine."""
    names = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
    plain = gr.themes.Base(
        font=[gr.themes.Font(name) for name in names],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "monospace")],
        neutral_hue=gr.themes.colors.slate,
    )
    looks: dict[str, Any] = dict(
        body_background_fill="#fff",
        body_text_color=INK,
        block_border_color=LINE,
        block_label_text_color=GREY,
        block_info_text_color=GREY,
        block_title_text_color=INK,
        block_title_text_weight="600",
        button_primary_background_fill=BLUE,
        button_primary_background_fill_hover="#005a8e",
        button_primary_text_color="#fff",
        button_secondary_background_fill=SOFT,
        checkbox_background_color_selected=BLUE,
        checkbox_border_color_selected=BLUE,
        checkbox_label_background_fill=SOFT,
        slider_color=BLUE,
        input_border_color=LINE,
        input_border_color_focus=BLUE,
        color_accent=BLUE,
    )
    return plain.set(**looks)


def blocks(studio: Studio, folder: Path) -> gr.Blocks:
    """The page of a studio, whose pictures are written in new folders in `folder`."""
    desk = Desk(studio, folder)

    def draw(*fields: Any) -> Iterator[dict[Any, Any]]:
        caption, steps, euler, *numbers, before = fields
        yield {download: gr.DownloadButton(interactive=False)}
        for now in desk.draw(caption, steps, euler, numbers, before):
            told: dict[Any, Any] = {shown: now.html}
            if now.pack is not None:
                told[download] = gr.DownloadButton(value=now.pack, interactive=True)
            if now.drawings is not None:
                every = [(file, said(Path(file))) for files in now.drawings for file in files]
                told |= {gallery: gr.Gallery(every, visible=True), state: now.drawings}
            yield told

    examples = DIGITS if studio.digits else NAMED if studio.pixels else OTHERS
    made = gr.Blocks(title=f"{name_of(studio)}: EMF-MeanFlow")
    with made:
        gr.HTML(header(studio))
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=1, min_width=300):
                caption = gr.Textbox(examples[0], label="Caption", lines=2, max_lines=6, elem_id="caption")
                gr.Examples([[text] for text in examples], caption, label="For example")
                steps = gr.CheckboxGroup(
                    [(str(n), n) for n in FEW],
                    value=list(FEW) if studio.few_step else [],
                    label="EMF, steps",
                    visible=studio.few_step,
                    elem_id="steps",
                )
                euler = gr.CheckboxGroup(
                    [(str(n), n) for n in EULER],
                    value=[30] if studio.pixels or not studio.few_step else [],
                    label="Flow matching, steps",
                    info="The baseline: a step is one of Euler's method",
                    elem_id="euler",
                )
                with gr.Row():
                    guidance = gr.Number(
                        studio.sampler.guidance, label="Guidance", info="1 is none", step=0.25, min_width=90
                    )
                    seed = gr.Number(0, label="Seed", info="of the noise", precision=0, min_width=90, elem_id="seed")
                n = gr.Slider(1, MOST, 1, step=1, label="Pictures", elem_id="count")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Row():
                    another = gr.Button("Another seed", elem_id="another", size="md", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", size="md", min_width=60)
            with gr.Column(scale=3, min_width=320):
                shown = gr.HTML(page.note("Write a caption and draw it."), elem_id="drawn")
                download = gr.DownloadButton(
                    "Download these pictures with their settings", interactive=False, size="md", elem_id="download"
                )
                gallery = gr.Gallery(
                    label="All of this visit",
                    columns=6,
                    fit_columns=False,
                    height="auto",
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                    visible=False,
                    elem_id="gallery",
                )
        state = gr.State([], time_to_live=24 * 3600, delete_callback=desk.forget)
        how: dict[str, Any] = dict(
            fn=draw,
            inputs=[caption, steps, euler, guidance, seed, n, state],
            outputs=[shown, download, gallery, state],
            show_progress="hidden",
            api_visibility="private",
        )
        drawing: list[dict[str, Any]] = [button.click(**how), caption.submit(**how)]
        chosen = another.click(lambda: random.randrange(2**31), None, seed, api_visibility="private")
        drawing.append(chosen.then(**how))
        stop.click(None, cancels=drawing, api_visibility="private")
    return made
