//! The command line, as clap reads it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::engine::ArgValueCandidates;
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
    /// Runs a machine until it ends.
    ///
    /// With the serial port or the console on stdio the terminal belongs to the guest: Ctrl-a x ends the
    /// machine, Ctrl-a Ctrl-a types one Ctrl-a.
    #[command(after_help = format!("{SIGNALS}{STATUSES}"))]
    Run(Box<Run>),
    /// Tells what this host offers: virtualization hardware, clocks, limits, and which engine `auto` takes.
    Doctor(crate::doctor::Doctor),
    /// To a machine that runs.
    #[command(flatten)]
    Remote(Remote),
}

/// What can be done with machines that run.
#[derive(Debug, Subcommand)]
pub(crate) enum Remote {
    /// Lists the machines that run.
    List(Output),
    /// Says what a machine is and does.
    Info(One),
    /// Attaches to the terminal of a machine: what it printed last, then both ways. Ctrl-a x leaves it; the machine
    /// goes on.
    Console {
        #[command(flatten)]
        one: Name,
        /// Bytes of the past to show first.
        #[arg(long, value_name = "BYTES", default_value_t = 16384)]
        past: usize,
    },
    /// Pauses a machine.
    Pause(One),
    /// Lets a paused machine go on.
    Resume {
        #[command(flatten)]
        one: One,
        /// What guest time does about the pause, instead of the machine's own --on-resume: freeze, advance or
        /// step:SPAN.
        #[arg(long, value_name = "POLICY")]
        clock: Option<String>,
    },
    /// Ends a machine: presses its power button, and ends it at once if it is still there after a time.
    Stop {
        #[command(flatten)]
        one: One,
        /// End it at once.
        #[arg(long)]
        now: bool,
        /// How long the guest has.
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        timeout: u64,
    },
    /// Resets a machine: it starts anew.
    Reset(One),
    /// Sends an NMI to the vCPUs of a machine.
    Nmi {
        #[command(flatten)]
        one: One,
        /// To this vCPU alone.
        #[arg(long, value_name = "N")]
        vcpu: Option<usize>,
    },
    /// Waits until a machine has ended; exits with the status that its `wardian run` has.
    Wait(One),
    /// Prints what happens to a machine, until it has ended: what was, then what comes.
    Events {
        #[command(flatten)]
        one: One,
        /// Only so many of the past.
        #[arg(long, value_name = "N")]
        past: Option<usize>,
        /// Only the past.
        #[arg(long)]
        no_follow: bool,
    },
    /// Shows the state of a machine's devices and vCPUs as a tree of named values, while it runs.
    Inspect {
        #[command(flatten)]
        one: One,
        /// A part of it, such as devices/serial or vcpus/0/registers.
        #[arg(default_value = "")]
        path: String,
    },
    /// Prints a machine's counters in the text format of Prometheus; with --json, all that is counted, as
    /// `run --stats-json` writes it.
    Metrics(One),
    /// Asks a machine anything that its OpenAPI document knows (GET /openapi.json).
    Call {
        #[command(flatten)]
        one: Name,
        /// GET or POST.
        method: String,
        /// Such as /vcpus/0.
        path: String,
        /// JSON to go with it.
        body: Option<String>,
    },
}

/// How to print.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Output {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// One machine.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Name of the machine.
    #[arg(add = ArgValueCandidates::new(crate::remote::candidates))]
    pub(crate) name: String,
}

/// One machine, and how to print what it says.
#[derive(Debug, Args)]
pub(crate) struct One {
    #[command(flatten)]
    pub(crate) name: Name,
    #[command(flatten)]
    pub(crate) output: Output,
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
    /// Name of the machine, by which the other commands find it [default: vm- and the number of the process].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Run in the background: print the machine's name once it runs, and return. What uses stdio is shown by
    /// `wardian console NAME`.
    #[arg(long)]
    pub(crate) detach: bool,
    /// With --detach, write what would be printed on standard error to this file.
    #[arg(long, value_name = "FILE", requires = "detach")]
    pub(crate) log: Option<PathBuf>,
    /// With --detach, print JSON.
    #[arg(long, requires = "detach")]
    pub(crate) json: bool,
    /// End at a reset instead of starting anew.
    #[arg(long)]
    no_reboot: bool,
    /// Start paused: `wardian resume NAME` or USR2 lets it go on.
    #[arg(long)]
    paused: bool,
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
            paused: self.paused,
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
