//! A machine in the background: started by a process that waits only until it runs.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// The variable by which a process knows that it is the one in the background: the number of who started it.
const MARK: &str = "WARDIAN_DETACHED";

/// Whether this process is the one in the background.
pub(crate) fn is_background() -> bool {
    let parent = rustix::process::getppid().map(|parent| parent.as_raw_nonzero().to_string());
    parent.is_some() && std::env::var(MARK).ok() == parent
}

/// Starts this command line once more, in the background; prints the machine's name when it runs.
pub(crate) fn start(json: bool) -> io::Result<u8> {
    let mut child = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .env(MARK, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    let name = line.trim();
    if name.is_empty() {
        // It has said why.
        let status = child.wait()?;
        return Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(wardian_machine::status::ENGINE));
    }
    if json {
        println!("{}", serde_json::json!({ "name": name, "pid": child.id() }));
    } else {
        println!("{name}");
    }
    Ok(0)
}

/// Leaves the terminal behind.
pub(crate) fn begin() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// The machine runs: tells whoever started this, and closes the streams that it shares.
pub(crate) fn ready(name: &str, log: Option<&Path>) -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let messages = log.map(File::create).transpose()?;
    let mut stdout = io::stdout();
    writeln!(stdout, "{name}")?;
    stdout.flush()?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(messages.as_ref().unwrap_or(&null))?;
    Ok(())
}
