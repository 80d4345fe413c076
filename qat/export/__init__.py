"""One trained artifact in every format that people serve: ``qat export ARTIFACT format=… out=…``.

Data flows one way: `source` reads codes and scales from the artifact, a format (one module each,
listed in `run.FORMATS`) packs them and reads its own output back with a package that is not ours,
`compare` holds what was read against the source. Nothing here rounds a weight unless the user asked
for it with ``allow_lossy=true``.
"""

from qat.export.run import ExportOptions, ExportReport, export

__all__ = ["ExportOptions", "ExportReport", "export"]
