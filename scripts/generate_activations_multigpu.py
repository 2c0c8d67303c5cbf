"""Published name of `lorascope generate`."""

from lorascope.cli import call_stage

if __name__ == "__main__":
    call_stage("generate")
