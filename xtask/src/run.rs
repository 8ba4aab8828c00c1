//! Host programs: calling them, having them, showing that they work.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// One long step: a spinner with the last line of output on a terminal, a start and an end line elsewhere.
pub struct Step {
    bar: Option<ProgressBar>,
    name: String,
    began: Instant,
}

impl Step {
    pub fn begin(name: impl Into<String>) -> Step {
        let name = name.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}") {
                bar.set_style(style);
            }
            bar.set_prefix(name.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("{name} ...");
        }
        Step { bar, name, began: Instant::now() }
    }

    pub fn say(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(line.trim().to_owned());
        }
    }

    pub fn end(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: {:.1} s", self.name, self.began.elapsed().as_secs_f64());
    }

    /// Runs `command`, feeding its output to the spinner.
    ///
    /// # Errors
    /// With its last lines of output when it fails.
    pub fn run(&self, command: &mut Command) -> Result<()> {
        let shown = shown(command);
        let (reader, writer) = std::io::pipe().context("Cannot make a pipe")?;
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().with_context(|| format!("Cannot start {shown}"))?;
        // The command keeps its copies of the pipe's writing end until it is told otherwise.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut tail = VecDeque::new();
        for line in BufReader::new(reader).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            self.say(&line);
            tail.push_back(line);
            if tail.len() > 15 {
                tail.pop_front();
            }
        }
        let status = child.wait()?;
        if !status.success() {
            let tail = tail.into_iter().collect::<Vec<_>>().join("\n");
            bail!("{shown} ended with {status}:\n{tail}");
        }
        Ok(())
    }
}

fn shown(command: &Command) -> String {
    let mut all = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        all.push(' ');
        all.push_str(&arg.to_string_lossy());
    }
    all
}

/// Standard output of `command` as text.
///
/// # Errors
/// When it cannot start or fails.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let out = command.output().with_context(|| format!("Cannot start {shown}"))?;
    if !out.status.success() {
        bail!("{shown} ended with {}:\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Where `program` lies, administrators' folders included.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|p| p.is_file())
}

/// Whether this process is root.
pub fn is_root() -> bool {
    output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

/// Makes sure that the host programs exist, as pairs of (program, package).
///
/// # Errors
/// When one is missing and this process may not install packages, or the installation fails.
pub fn need(tools: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&(&str, &str)> = tools.iter().filter(|(program, _)| which(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    if which("apt-get").is_none() {
        bail!("This command needs apt-get and {}: run it on a Debian machine", packages.join(", "));
    }
    if !is_root() {
        bail!(
            "Host programs are missing; install them as root: apt-get install {} (or run this command as root)",
            packages.join(" ")
        );
    }
    let step = Step::begin(format!("Installing {}", packages.join(" ")));
    let install = || {
        step.run(
            Command::new("apt-get")
                .args(["install", "-y", "-q", "--no-install-recommends"])
                .args(&packages)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    if install().is_err() {
        step.run(Command::new("apt-get").args(["update", "-q"]))?;
        install()?;
    }
    step.end();
    Ok(())
}

/// Top of this repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}
