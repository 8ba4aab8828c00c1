//! One guest of the lockup matrix: its start, its console, its end.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::vm::{Guest, run_parameter};
use crate::guest::spin::Module;
use crate::throttle::Throttle;

/// What all guests of the matrix are made from.
pub struct Makings {
    pub wardian: PathBuf,
    pub guest: Guest,
    pub module: Module,
    pub out: PathBuf,
    /// Watchdogs of the guest that bark soon, and a doctor that does.
    pub quick: bool,
}

#[derive(Default)]
struct Console {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

impl Console {
    fn read(&self, from: impl std::io::Read) {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        while matches!(from.read_until(b'\n', &mut bytes), Ok(1..)) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            self.grown.notify_all();
        }
    }
}

/// A guest that runs. Dropping it ends it.
pub struct Machine {
    name: String,
    child: Child,
    console: Arc<Console>,
    readers: Vec<JoinHandle<()>>,
    events: PathBuf,
    log: PathBuf,
    /// The cgroup that the process is in; it goes after the process.
    pub throttle: Option<Throttle>,
}

/// The guest is ready for what comes.
const READY: &str = "LAB-READY";

impl Makings {
    /// Starts a guest with two vCPUs that does `script` once a line comes, and waits until it is ready for that.
    /// `busy`: both vCPUs compute all the time.
    ///
    /// # Errors
    /// When it does not start, or does not get ready.
    pub fn start(&self, name: &str, busy: bool, script: &str) -> Result<Machine> {
        let watchdogs = "echo 1 > /proc/sys/kernel/watchdog_thresh\n\
                         echo 3 > /sys/module/rcupdate/parameters/rcu_cpu_stall_timeout\n";
        let loops = "for c in 0 1; do taskset -c $c sh -c 'while :; do :; done' & done\n";
        let whole = format!(
            "head -c {} /dev/vdb > /tmp/spin.ko\n{}{}echo {READY}\nread line\n{script}\nread line\n",
            self.module.len,
            if self.quick { watchdogs } else { "" },
            if busy { loops } else { "" }
        );
        let (events, log) = (self.out.join(format!("{name}.events")), self.out.join(format!("{name}.log")));
        let mut command = Command::new(&self.wardian);
        command.args(["run", "--no-reboot", "--cpus", "2", "--memory", "256M", "--serial", "stdio"]);
        command.arg("--kernel").arg(&self.guest.kernel).arg("--initrd").arg(&self.guest.initrd);
        for disk in [&self.guest.disk, &self.module.disk] {
            command.arg("--disk").arg(format!("{},readonly,format=raw", disk.display()));
        }
        let words = format!("{} panic=-1 {}", self.guest.cmdline, run_parameter(&whole));
        command.arg("--cmdline").arg(words).arg("--events").arg(&events);
        command.args(["--lockup-seconds", if self.quick { "3" } else { "20" }]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().with_context(|| format!("Cannot start {}", self.wardian.display()))?;
        let console = Arc::<Console>::default();
        let mut readers = Vec::new();
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let of_out = Arc::clone(&console);
        readers.extend(out.map(|out| std::thread::spawn(move || of_out.read(out))));
        let of_err = Arc::clone(&console);
        readers.extend(err.map(|err| std::thread::spawn(move || of_err.read(err))));
        let name = name.to_owned();
        let mut machine = Machine { name, child, console, readers, events, log, throttle: None };
        machine.wait_for(READY, Duration::from_secs(60))?;
        Ok(machine)
    }
}

impl Machine {
    /// Waits for a line with `text` on the console.
    ///
    /// # Errors
    /// When it does not come, or the machine ends.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            let ended = self.child.try_wait()?;
            let lines = self.console.lines.lock().unwrap_or_else(PoisonError::into_inner);
            if lines.iter().any(|line| line.contains(text)) {
                return Ok(());
            }
            if ended.is_some() || Instant::now() > until {
                let tail: Vec<&str> = lines.iter().rev().take(15).map(String::as_str).collect();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                bail!("{}: no {text} on the console; it ends with\n{tail}", self.name);
            }
            drop(self.console.grown.wait_timeout(lines, Duration::from_millis(100)));
        }
    }

    /// Types an empty line: the guest goes on with its script.
    ///
    /// # Errors
    /// When the machine takes no input.
    pub fn go_on(&mut self) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("no input")?;
        stdin.write_all(b"\n").and_then(|()| stdin.flush()).context("The machine takes no input")
    }

    /// Sends the process a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no process")?;
        kill_process(pid, signal).context("Cannot signal the machine")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Lets the guest power off, waits for that, and gives its console and its events. The console is kept.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn end(mut self) -> Result<(Vec<String>, String)> {
        self.go_on()?;
        let until = Instant::now() + Duration::from_secs(60);
        let status: Option<ExitStatus> = loop {
            match self.child.try_wait()? {
                None if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
                status => break status,
            }
        };
        if status.is_none() {
            self.child.kill()?;
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let lines = self.console.lines.lock().unwrap_or_else(PoisonError::into_inner).clone();
        std::fs::write(&self.log, lines.join("\n"))?;
        if !status.is_some_and(|status| status.success()) {
            bail!("{}: it ended with {status:?}; see {}", self.name, self.log.display());
        }
        Ok((lines, read(&self.events)?))
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("Cannot read {}", path.display()))
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
