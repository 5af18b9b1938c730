"""The wheel, installed outside the checkout, contains a working program with its migrations and data."""

import contextlib
import re
import sqlite3
import subprocess
import sys
import tomllib

import httpx


def run(*arguments, **options):
    process = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=200, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_installed_wheel_works(tmp_path, repository, environ):
    install, home = tmp_path / "installed", tmp_path / "home"
    home.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    run(*pip, "wheel", str(repository), *offline, "--no-build-isolation", "--wheel-dir", str(tmp_path))
    wheel = next(tmp_path.glob("*.whl"))
    run(*pip, "install", *offline, "--target", str(install), str(wheel))

    environ |= {"PYTHONPATH": str(install)}

    def python(*arguments):
        return run(sys.executable, "-P", *arguments, cwd=home, env=environ)

    def program(*arguments):
        return python("-m", "audience_sync", *arguments)

    assert python("-c", "import audience_sync; print(audience_sync.__file__)").startswith(str(install))
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert program("--version") == f"audience-sync {version}\n"
    program("init")
    starter = (repository / "config" / "audience_sync.toml").read_text()
    assert (home / "config" / "audience_sync.toml").read_text() == starter

    assert "at version" in program("db", "upgrade")
    assert "the newest" in program("db", "current")
    with contextlib.closing(sqlite3.connect(home / "audience_sync.db")) as database:
        database.execute("CREATE TABLE orders (user_id text, ordered_on text, total_gbp real)")
        database.execute("INSERT INTO orders VALUES ('u1', date('now'), 12.5), ('u2', '2020-01-01', 1)")
        database.commit()
    asked = program("sync", "--no-deliver")  # one member of the starter's audience, two values of its trait
    assert "sends 3 deliveries in the queue." in asked

    ended = program("demo", "months")
    assert "31 syncs of three audiences" in ended
    assert ended.splitlines()[-1].endswith(" init my-audiences")  # a checkout has a configuration already
    suggested = ended.partition("open the dashboard in a browser:\n")[2].splitlines()[0]
    assert suggested.endswith(" --config months/audience_sync.toml serve")
    serve = (sys.executable, "-P", "-m", "audience_sync", *suggested.split()[-3:], "--port", "0")
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, cwd=home, env=environ) as process:
        try:
            address = re.search(r"http://127.0.0.1:\d+/", process.stdout.readline())[0]
            page = httpx.get(address)
            assert "at_risk" in page.text
            for name in re.findall(r'(?:src|href)="/(static/[^"]+)"', page.text):
                assert httpx.get(address + name).status_code == 200, name
        finally:
            process.terminate()
    shipped = {path.relative_to(install) for path in (install / "audience_sync" / "web").rglob("*.*")}
    assert {path for path in shipped if path.suffix not in {".py", ".pyc"}} == {
        path.relative_to(repository)
        for path in (repository / "audience_sync" / "web").rglob("*.*")
        if path.suffix not in {".py", ".pyc"}
    }
    asked = program("--config", "months/audience_sync.toml", "history", "at_risk")
    assert "succeeded" in asked
    assert "CC BY 4.0" in (install / "audience_sync" / "demo_data" / "ATTRIBUTION.txt").read_text()
    assert {path.name for path in (install / "audience_sync" / "_migrations" / "versions").glob("0*.py")} == {
        path.name for path in (repository / "migrations" / "versions").glob("0*.py")
    }
    assert {path.name for path in install.iterdir()} >= {"audience_sync", "bin"}
    assert not (install / "tests").exists()
