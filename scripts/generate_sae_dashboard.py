"""Published name of `lorascope dashboard`."""

from lorascope.cli import call_stage

if __name__ == "__main__":
    call_stage("dashboard")
