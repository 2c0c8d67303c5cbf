"""Published name of `lorascope train`."""

from lorascope.cli import call_stage

if __name__ == "__main__":
    call_stage("train")
