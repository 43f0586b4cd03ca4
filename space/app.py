"""The Space of anodiff: maps of an uploaded scan, and the noise explorer."""

from anodiff.apps.explorer_page import fill_explorer
from anodiff.apps.maps_page import fill_maps
from anodiff.apps.pages import launch, make_page


page = make_page("anodiff", {"Anomaly maps": fill_maps, "Noise explorer": fill_explorer})

if __name__ == "__main__":
    launch(page)
    page.block_thread()
