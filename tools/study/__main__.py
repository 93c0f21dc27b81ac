"""``python -m earlyfuse.tools.study``."""

from earlyfuse.tools.study.study import main

raise SystemExit(main())
