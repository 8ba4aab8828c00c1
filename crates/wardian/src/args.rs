//! The command line, as clap reads it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use wardian_machine::{
    Config, ConfigError, CpuCount, DebugAddress, DiskArg, Endpoint, EngineChoice, LockupSeconds, MemorySize,
    ModuleArg, OnResume, TimeSource, TimerPolicies, TscModeArg,
};

const STATUSES: &str = "\
Exit status of `wardian run`:
   0  the guest powered off
   2  bad input: command line, configuration, kernel, initrd, module, disk, output file
   4  the guest asked for a reset, with --no-reboot
   6  the guest met a triple fault
   8  the engine cannot go on, or Wardian itself failed
  10  the host refuses something that is needed: memory, threads, a socket
  12  ended from outside: SIGINT, SIGTERM, SIGHUP, SIGQUIT, Ctrl-a x, the debugger's kill
 odd  with --debug-exit, the guest wrote N to port F4h: (N << 1 | 1) & 255";

const SIGNALS: &str = "\
Signals to `wardian run`:
  USR1  pauses the machine; USR2 lets it go on (see --on-resume)
  TERM, INT, HUP, QUIT  end it; a second one at once

";

/// Keeps a whole machine under glass: runs unmodified operating systems on Linux x86-64, with or without
/// virtualization hardware.
#[derive(Debug, Parser)]
#[command(name = "wardian", version, after_help = format!("{SIGNALS}{STATUSES}"))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a machine in the foreground until it ends.
    ///
    /// With the serial port or the console on stdio the terminal belongs to the guest: Ctrl-a x ends the
    /// machine, Ctrl-a Ctrl-a types one Ctrl-a.
    #[command(after_help = format!("{SIGNALS}{STATUSES}"))]
    Run(Box<Run>),
    /// Tells what this host offers: virtualization hardware, clocks, limits, and which engine `auto` takes.
    Doctor(crate::doctor::Doctor),
}

/// Fields of the machine; each is a field of the same name in the configuration file, too.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Configuration file with the same fields as these options. What is given here goes over what is
    /// there; disks and modules are added.
    config: Option<PathBuf>,
    /// Kernel: Linux bzImage, ELF with a PVH note, or multiboot 1.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Multiboot module with its command line; may be repeated.
    #[arg(long, value_name = "PATH [TEXT]")]
    module: Vec<ModuleArg>,
    /// Disk (virtio-blk); may be repeated. Without a format it is looked for.
    #[arg(long, value_name = "PATH[,readonly][,format=raw|qcow2]")]
    disk: Vec<DiskArg>,
    /// Guest RAM, with K, M or G [default: 512M].
    #[arg(long, value_name = "SIZE")]
    memory: Option<MemorySize>,
    /// vCPUs, 1 to 64 [default: 1].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<CpuCount>,
    /// Engine: auto, soft, kvm, kvm-forced, or soft-check, which compares each translated block with its single instructions
    /// [default: auto].
    #[arg(long, value_name = "NAME")]
    engine: Option<EngineChoice>,
    /// Processor model: host or x86-64-v1 to -v4, then any of ,+feature ,-feature ,vendor=AuthenticAMD
    /// ,family=N ,model=N ,stepping=N [default: host].
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// First serial port: stdio, file:PATH or none [default: stdio, unless the console has it].
    #[arg(long, value_name = "WHERE")]
    serial: Option<Endpoint>,
    /// Virtio console: stdio, file:PATH or none [default: none].
    #[arg(long, value_name = "WHERE")]
    console: Option<Endpoint>,
    /// Debug console at port E9h: stdio, file:PATH or none [default: stdio].
    #[arg(long, value_name = "WHERE")]
    debug_console: Option<Endpoint>,
    /// Let the guest end the machine by writing to port F4h.
    #[arg(long)]
    debug_exit: bool,
    /// Write down what the guest tells through the doorbell (32-bit ports 5C0h, 5C4h), with the host's
    /// CLOCK_MONOTONIC_RAW, to this file.
    #[arg(long, value_name = "FILE")]
    doorbell: Option<PathBuf>,
    /// Let debuggers in at this port of 127.0.0.1 or this Unix socket; they may come and go while the
    /// guest runs.
    #[arg(long, value_name = "PATH|PORT")]
    gdb: Option<String>,
    /// Start the vCPUs only when a debugger says so.
    #[arg(long, requires = "gdb")]
    gdb_wait: bool,
    /// Name of the machine.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// End at a reset instead of starting anew.
    #[arg(long)]
    no_reboot: bool,
    /// What guest time follows: host (its clock) or virtual (1 ns for each instruction that the one vCPU
    /// retires, no time while it is halted: two runs take the same timer interrupts at the same instructions)
    /// [default: host].
    #[arg(long, value_name = "SOURCE")]
    time: Option<TimeSource>,
    /// Write each interrupt that the guest takes in virtual time to this file: instructions retired, guest time,
    /// address, vector.
    #[arg(long, value_name = "FILE")]
    trace_interrupts: Option<PathBuf>,
    /// What becomes of timer ticks that the guest could not take in time: delay, replay, replay-slew, sync,
    /// late-one or async, for all timers or for pit, rtc, hpet or lapic (rtc=replay-slew); may be repeated
    /// [default: late-one].
    #[arg(long, value_name = "[DEVICE=]POLICY")]
    timer_policy: Vec<TimerPolicies>,
    /// Let periodic timers tick at multiples of their period, so that the host wakes less often.
    #[arg(long)]
    timer_align: bool,
    /// Time-stamp counter of the guest: default (the host's rate, from 0), emulate (likewise, strictly
    /// increasing) or native (the host's own) [default: default].
    #[arg(long, value_name = "MODE")]
    tsc_mode: Option<TscModeArg>,
    /// What guest time does about a pause: freeze (it goes on where it stopped), advance (it keeps the host's
    /// time) or step:SPAN, such as step:1.5s [default: advance].
    #[arg(long, value_name = "POLICY")]
    on_resume: Option<OnResume>,
    /// Say why a vCPU makes no progress for so many seconds, 3 to 3600, or 0 for never, without an
    /// account of where its time goes [default: 20].
    #[arg(long, value_name = "SECONDS")]
    lockup_seconds: Option<LockupSeconds>,
    /// Write what happens to this file, as JSON lines: pauses, stops, vCPUs without progress.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Print exit and engine counters at the end.
    #[arg(long)]
    stats: bool,
    /// Write exit and engine counters to this file at the end, as JSON.
    #[arg(long, value_name = "FILE")]
    stats_json: Option<PathBuf>,
}

impl Run {
    /// The configuration: the file, with the options over it.
    pub(crate) fn config(self) -> Result<Config, ConfigError> {
        let file = self.config.as_deref().map(Config::from_file).transpose()?.unwrap_or_default();
        let gdb = self.gdb.map(|text| {
            text.parse::<DebugAddress>().map_err(|e| ConfigError::Value {
                what: "address for the debugger",
                value: text,
                why: e.to_string(),
            })
        });
        Ok(file.overridden_by(Config {
            name: self.name,
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            module: self.module,
            disk: self.disk,
            memory: self.memory,
            cpus: self.cpus,
            engine: self.engine,
            cpu: self.cpu,
            serial: self.serial,
            console: self.console,
            debug_console: self.debug_console,
            debug_exit: self.debug_exit,
            doorbell: self.doorbell,
            gdb: gdb.transpose()?,
            gdb_wait: self.gdb_wait,
            no_reboot: self.no_reboot,
            time: self.time,
            trace_interrupts: self.trace_interrupts,
            timer_policy: self
                .timer_policy
                .into_iter()
                .fold(TimerPolicies::default(), TimerPolicies::overridden_by),
            timer_align: self.timer_align,
            tsc_mode: self.tsc_mode,
            on_resume: self.on_resume,
            lockup_seconds: self.lockup_seconds,
            events: self.events,
            stats: self.stats,
            stats_json: self.stats_json,
        }))
    }
}
