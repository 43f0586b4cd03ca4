from anodiff import AnoDDPMPipeline  # noqa: F401
