//! Programs of the host: the one under test, cargo and other tools.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The top of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// `wardian`, built with optimisation, once.
///
/// # Panics
/// If it cannot be built.
pub fn wardian() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(path) = env::var_os("WARDIAN_BIN") {
            return PathBuf::from(path);
        }
        let mut cargo = cargo();
        cargo.args(["build", "--release", "--quiet", "-p", "wardian", "--message-format=json"]);
        let text = output(&mut cargo).unwrap_or_else(|error| panic!("{error}"));
        let built = text.lines().find_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            message["executable"].as_str().filter(|path| path.ends_with("wardian")).map(PathBuf::from)
        });
        built.unwrap_or_else(|| panic!("cargo does not say where it put wardian: {text}"))
    })
}

pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(repository());
    cargo
}

/// Runs a program to its end and gives its standard output.
///
/// # Errors
/// That it does not start or does not succeed, with what it said.
pub fn output(command: &mut Command) -> Result<String, String> {
    let done = command.stdin(Stdio::null()).output().map_err(|e| format!("Cannot start {command:?}: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if done.status.success() {
        return Ok(text(&done.stdout));
    }
    Err(format!("{command:?}: {}\n{}{}", done.status, text(&done.stdout), text(&done.stderr)))
}

/// Whether a program is installed.
#[must_use]
pub fn has(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Says that the test cannot run, and why.
///
/// # Panics
/// If `$WARDIAN_TESTS` is `all`: then every test must run.
pub fn skip(why: &str) {
    assert!(env::var_os("WARDIAN_TESTS").is_none_or(|wish| wish != "all"), "cannot run, because {why}");
    // Past the capture of the test harness: a skipped test is seen.
    let _ = rustix::io::write(rustix::stdio::stderr(), format!("skipped, because {why}\n").as_bytes());
}
