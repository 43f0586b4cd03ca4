from anodiff import ANDiPipeline  # noqa: F401
