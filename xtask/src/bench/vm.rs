//! One run of a machine, ours or QEMU's: the command, its console by line with host time, its end.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::footprint::{self, Memory, Peak};
use crate::run::{Step, output, repository};

/// A stock guest, as `cargo xtask guest debian --json` tells it.
#[derive(Clone, Deserialize)]
pub struct Guest {
    pub version: String,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
    pub cmdline: String,
}

/// Makes the stock guest when it is not in the cache yet.
///
/// # Errors
/// When it cannot be made.
pub fn guest() -> Result<Guest> {
    let me = std::env::current_exe().context("Cannot tell this program's own path")?;
    let told = output(Command::new(me).args(["guest", "debian", "--json"]).stderr(Stdio::inherit()))?;
    serde_json::from_str(&told).context("`xtask guest debian --json` told something else")
}

/// Builds `wardian` optimized and tells where it is, unless one is given.
///
/// # Errors
/// When it cannot be built, or the given one is not there.
pub fn wardian(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(given) = given {
        return given.canonicalize().with_context(|| format!("Cannot find {}", given.display()));
    }
    let step = Step::begin("Building wardian");
    let told = output(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--quiet", "-p", "wardian"])
            .arg("--message-format=json-render-diagnostics")
            .current_dir(repository())
            .stderr(Stdio::inherit()),
    )?;
    step.end();
    told.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|told| told["target"]["name"] == "wardian")
        .find_map(|told| told["executable"].as_str().map(PathBuf::from))
        .context("Cargo told no executable of wardian")
}

/// A copy of the disk `from` that may be written to, with its holes, down on the medium already: a flush
/// inside the guest pays for the guest's own writes alone.
///
/// # Errors
/// When it cannot be copied.
pub fn copy_disk(from: &Path, to: &Path) -> Result<()> {
    output(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to))?;
    let file = std::fs::File::options().write(true).open(to)?;
    file.sync_all().with_context(|| format!("Cannot write {}", to.display()))
}

/// The kernel's parameter that makes the guest's init run `script`.
pub fn run_parameter(script: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("wardian.run=");
    for group in script.as_bytes().chunks(3) {
        let bits = group.iter().fold(0_usize, |bits, &byte| bits << 8 | usize::from(byte))
            << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = char::from(DIGITS[bits >> (18 - 6 * place) & 63]);
            text.push(if place > group.len() { '=' } else { digit });
        }
    }
    text
}

/// What the machines of a bench are and how long they may take.
#[derive(clap::Args)]
pub struct Options {
    /// Guest RAM.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: String,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    pub wardian: Option<PathBuf>,
    /// One more argument for `wardian run`; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub wardian_arg: Vec<String>,
    /// Machine type of QEMU.
    #[arg(long, value_name = "TYPE", default_value = "q35")]
    pub qemu_machine: String,
    /// Seconds that one run may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    limit: u64,
}

impl Options {
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.limit)
    }
}

/// Which program runs the machine.
pub enum Vmm {
    Wardian { program: PathBuf, args: Vec<String> },
    Qemu { program: PathBuf, machine: String },
}

/// What is run; the same for both.
#[derive(Clone)]
pub struct Machine {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
    pub cmdline: String,
    pub memory: String,
    pub cpus: u32,
}

impl Vmm {
    /// `memfd`: QEMU's guest RAM as a mapping with a name, to tell it from the rest of its memory.
    pub fn command(&self, machine: &Machine, memfd: bool) -> Command {
        let mut command;
        match self {
            Vmm::Wardian { program, args } => {
                command = Command::new(program);
                command.arg("run").arg("--disk").arg(&machine.disk);
                command.arg("--kernel").arg(&machine.kernel).arg("--initrd").arg(&machine.initrd);
                command.arg("--cmdline").arg(&machine.cmdline).arg("--memory").arg(&machine.memory);
                command.arg("--cpus").arg(machine.cpus.to_string()).args(args);
            }
            Vmm::Qemu { program, machine: model } => {
                command = Command::new(program);
                let mut model = model.clone();
                if memfd {
                    let size = &machine.memory;
                    command
                        .arg("-object")
                        .arg(format!("memory-backend-memfd,id=wardian-guest,size={size},share=on"));
                    model.push_str(",memory-backend=wardian-guest");
                }
                command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
                command.args(["-no-reboot", "-accel", "tcg", "-cpu", "max", "-machine", &model]);
                command.arg("-smp").arg(machine.cpus.to_string()).arg("-m").arg(&machine.memory);
                command.arg("-kernel").arg(&machine.kernel).arg("-initrd").arg(&machine.initrd);
                command.arg("-append").arg(&machine.cmdline).args(["-device", "virtio-rng-pci"]);
                // A comma in the value of an option is written twice.
                let disk = machine.disk.display().to_string().replace(',', ",,");
                command.arg("-drive").arg(format!("file={disk},format=raw,if=none,id=root"));
                command.args(["-device", "virtio-blk-pci,drive=root"]);
            }
        }
        command
    }
}

/// One line of the console.
pub struct Line {
    /// Since the start of the process until the end of the line came.
    pub at: Duration,
    /// CPU time of the process by then, told for lines with a marker.
    pub cpu: Option<Duration>,
    /// Without its end.
    pub text: String,
}

/// What became of a run.
pub struct Ran {
    pub lines: Vec<Line>,
    /// Standard error.
    pub messages: String,
    /// None: out of time, killed.
    pub status: Option<ExitStatus>,
    /// From start to end.
    pub took: Duration,
    /// Memory beside guest RAM and since when, when sampled.
    pub samples: Vec<(Duration, Memory)>,
}

impl Ran {
    /// Console and messages as text, each line with its time.
    pub fn log(&self) -> String {
        let mut log = String::new();
        for line in &self.lines {
            log.push_str(&format!("{:9.3} {}\n", line.at.as_secs_f64(), line.text));
        }
        if !self.messages.is_empty() {
            log.push_str("--- standard error\n");
            log.push_str(&self.messages);
        }
        let ended = self.status.map_or_else(|| "out of time, killed".to_owned(), |status| status.to_string());
        log.push_str(&format!("--- {ended} after {:.3} s\n", self.took.as_secs_f64()));
        log
    }

    /// The most of each, if memory was looked at.
    pub fn peak(&self) -> Option<Peak> {
        let mut peak = Peak::default();
        self.samples.iter().for_each(|(_, now)| peak.take(*now));
        (peak.samples > 0).then_some(peak)
    }

    /// Fails unless the process ended by itself with 0.
    pub fn check(&self) -> Result<()> {
        if self.status.is_some_and(|status| status.success()) {
            return Ok(());
        }
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(30).collect();
        bail!("the machine failed:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }
}

/// What marks the console lines that are measured.
pub const MARKER: &str = "WARDIAN-";

/// Every so often memory is looked at while a machine compiles.
pub const SAMPLE: Duration = Duration::from_millis(100);

/// Runs `machine` until it ends or `limit` is over. `sample`: how often to look at the process's memory.
///
/// # Errors
/// When the program cannot be started.
pub fn run(vmm: &Vmm, machine: &Machine, limit: Duration, sample: Option<Duration>) -> Result<Ran> {
    run_command(&mut vmm.command(machine, sample.is_some()), limit, sample)
}

/// The same for any program whose standard output is the console.
///
/// # Errors
/// When the program cannot be started.
pub fn run_command(command: &mut Command, limit: Duration, sample: Option<Duration>) -> Result<Ran> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child =
        command.spawn().with_context(|| format!("Cannot start {}", command.get_program().display()))?;
    let (pid, stdout, stderr) = (child.id(), child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let lines = scope.spawn(move || stdout.map_or_else(Vec::new, |out| read_lines(out, began, pid)));
        let messages = scope.spawn(move || {
            let mut bytes = Vec::new();
            // A broken pipe ends the text, no more.
            let _ = stderr.map(|mut err| err.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let (over, end) = mpsc::channel::<()>();
        let samples = sample.map(|every| {
            scope.spawn(move || {
                let mut samples = Vec::new();
                while matches!(end.recv_timeout(every), Err(RecvTimeoutError::Timeout)) {
                    samples.extend(footprint::measure(pid).map(|now| (began.elapsed(), now)));
                }
                samples
            })
        });
        let status = wait(&mut child, began + limit);
        let took = began.elapsed();
        drop(over);
        Ok(Ran {
            lines: lines.join().unwrap_or_default(),
            messages: messages.join().unwrap_or_default(),
            status: status?,
            took,
            samples: samples.and_then(|samples| samples.join().ok()).unwrap_or_default(),
        })
    })
}

fn wait(child: &mut Child, until: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn read_lines(mut out: impl Read, began: Instant, pid: u32) -> Vec<Line> {
    let (mut lines, mut rest, mut chunk) = (Vec::new(), Vec::new(), [0; 4096]);
    let mut take = |bytes: &[u8], at| {
        let text = String::from_utf8_lossy(bytes).trim_end_matches('\r').to_owned();
        let cpu = if text.contains(MARKER) { footprint::cpu_time(pid) } else { None };
        lines.push(Line { at, cpu, text });
    };
    loop {
        let count = match out.read(&mut chunk) {
            Ok(count) if count > 0 => count,
            _ => break,
        };
        let at = began.elapsed();
        rest.extend_from_slice(&chunk[..count]);
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            take(&rest[..end], at);
            rest.drain(..=end);
        }
    }
    if !rest.is_empty() {
        take(&rest, began.elapsed());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_in_base64() {
        for (script, text) in [
            ("", ""),
            ("a", "YQ=="),
            ("ab", "YWI="),
            ("abc", "YWJj"),
            ("exit 3\n", "ZXhpdCAzCg=="),
            ("?>~", "Pz5+"),
        ] {
            assert_eq!(run_parameter(script), format!("wardian.run={text}"));
        }
    }

    #[test]
    fn lines_with_times() {
        let lines = read_lines(&b"one\r\ntwo\nlast"[..], Instant::now(), std::process::id());
        let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!(texts, ["one", "two", "last"]);
        assert!(lines.iter().all(|line| line.cpu.is_none()));
        let marked = read_lines(&b"WARDIAN-INIT 1.05\n"[..], Instant::now(), std::process::id());
        assert!(marked[0].cpu.is_some());
    }
}
