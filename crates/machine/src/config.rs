//! What a user asks for: the fields of a TOML file and of the command line, and the check of both.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};
use wardian_gdb::Address;

/// Fewest bytes of guest RAM: the ACPI tables end at 1 MiB, a kernel starts there.
const MIN_MEMORY: u64 = 2 << 20;
/// Most bytes of guest RAM.
const MAX_MEMORY: u64 = 256 << 30;
/// Most vCPUs: what the board's interrupt chips and tables are made for.
pub const MAX_CPUS: u32 = 64;

/// A configuration that is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Could not read configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be, there.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong, with the field's name.
        message: String,
    },
    /// A value that is not possible.
    #[error("'{value}' is no {what}: {why}")]
    Value {
        /// What it should be.
        what: &'static str,
        /// What was given.
        value: String,
        /// The rule that it breaks.
        why: String,
    },
    /// Nothing to boot.
    #[error("No kernel is given: name one with --kernel, or with `kernel` in the configuration file")]
    NoKernel,
    /// Two devices want the terminal.
    #[error("Both the serial port and the console are to use the terminal (stdio); give it to one of them")]
    TerminalTwice,
    /// Several vCPUs in virtual time.
    #[error("Virtual time is the count of one vCPU's instructions: it goes with one vCPU, not with {0}")]
    VirtualTimeCpus(usize),
    /// A trace that would say nothing.
    #[error("Interrupts are traced by the count of instructions: that needs virtual time (--time virtual)")]
    TraceNeedsVirtualTime,
}

pub(crate) fn bad(what: &'static str, value: &str, why: impl Into<String>) -> ConfigError {
    ConfigError::Value { what, value: value.to_owned(), why: why.into() }
}

/// Deserializes from a string (or, where that makes sense, a number) by the type's `FromStr`, so that a file
/// and the command line understand the same.
macro_rules! by_text {
    ($type:ty, $expecting:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$type, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }
                from.deserialize_any(Text)
            }
        }
    };
}

mod timers;
mod watch;

pub use timers::{TimeSource, TimerPolicies, Timers, TscModeArg};
pub use watch::{LockupSeconds, OnResume};

/// Bytes of guest RAM: a number with an optional K, M, G or T (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<MemorySize, ConfigError> {
        let what = "memory size";
        let upper = text.trim().to_ascii_uppercase();
        let upper = upper.strip_suffix("IB").or(upper.strip_suffix('B')).unwrap_or(&upper);
        let (digits, shift) = match upper.chars().last() {
            Some('K') => (&upper[..upper.len() - 1], 10),
            Some('M') => (&upper[..upper.len() - 1], 20),
            Some('G') => (&upper[..upper.len() - 1], 30),
            Some('T') => (&upper[..upper.len() - 1], 40),
            _ => (upper, 0),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| bad(what, text, "give a number of bytes, or one with K, M, G or T, such as 512M"))?;
        let bytes = number
            .checked_mul(1 << shift)
            .filter(|bytes| *bytes <= MAX_MEMORY)
            .ok_or_else(|| bad(what, text, "the most is 256G"))?;
        if bytes < MIN_MEMORY {
            return Err(bad(what, text, "the least is 2M"));
        }
        if bytes % 4096 != 0 {
            return Err(bad(what, text, "it is no multiple of 4096 bytes"));
        }
        Ok(MemorySize(bytes))
    }
}
by_text!(MemorySize, "a memory size such as \"512M\"");

/// Number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuCount(pub u32);

impl FromStr for CpuCount {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<CpuCount, ConfigError> {
        text.trim()
            .parse()
            .ok()
            .filter(|count| (1..=MAX_CPUS).contains(count))
            .map(CpuCount)
            .ok_or_else(|| bad("number of vCPUs", text, format!("give 1 to {MAX_CPUS}")))
    }
}
by_text!(CpuCount, "a number of vCPUs");

/// Where a character device's bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The terminal: standard output, and standard input where the device takes input.
    Stdio,
    /// A file that is created or emptied; no input.
    File(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for Endpoint {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Endpoint, ConfigError> {
        match (text, text.strip_prefix("file:")) {
            ("stdio", _) => Ok(Endpoint::Stdio),
            ("none", _) => Ok(Endpoint::None),
            (_, Some(path)) if !path.is_empty() => Ok(Endpoint::File(path.into())),
            _ => Err(bad("place for a serial port or console", text, "give stdio, file:PATH or none")),
        }
    }
}
by_text!(Endpoint, "stdio, file:PATH or none");

/// Which engine runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The best that works on this host.
    #[default]
    Auto,
    /// The software engine.
    Soft,
    /// The host's processor, through `/dev/kvm`.
    Kvm,
    /// Likewise, even where KVM is software itself and a stock kernel is not expected to work.
    KvmForced,
    /// The software engine, comparing every superblock with its instructions one by one.
    SoftCheck,
}

impl FromStr for EngineChoice {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<EngineChoice, ConfigError> {
        match text {
            "auto" => Ok(EngineChoice::Auto),
            "soft" => Ok(EngineChoice::Soft),
            "kvm" => Ok(EngineChoice::Kvm),
            "kvm-forced" => Ok(EngineChoice::KvmForced),
            "soft-check" => Ok(EngineChoice::SoftCheck),
            _ => Err(bad("engine", text, "give auto, soft, kvm, kvm-forced or soft-check")),
        }
    }
}
by_text!(EngineChoice, "auto, soft, kvm, kvm-forced or soft-check");

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    /// The image file or block device.
    pub path: PathBuf,
    /// The guest may only read.
    pub readonly: bool,
    /// How the bytes are kept; `None`: look.
    pub format: Option<wardian_backend::Format>,
}

impl FromStr for DiskArg {
    type Err = ConfigError;

    /// `PATH[,readonly][,format=raw|qcow2]`; a comma within the path is doubled.
    fn from_str(text: &str) -> Result<DiskArg, ConfigError> {
        let joined = text.replace(",,", "\0");
        let mut words = joined.split(',').map(|word| word.replace('\0', ","));
        let path = words.next().filter(|path| !path.is_empty());
        let path = PathBuf::from(path.ok_or_else(|| bad("disk", text, "the path is missing"))?);
        let mut disk = DiskArg { path, readonly: false, format: None };
        for word in words {
            match (word.as_str(), word.strip_prefix("format=")) {
                ("readonly", _) => disk.readonly = true,
                (_, Some(name)) => disk.format = Some(format(name)?),
                _ => {
                    return Err(bad(
                        "disk",
                        text,
                        format!("'{word}' is no option; readonly and format= are"),
                    ));
                }
            }
        }
        Ok(disk)
    }
}

fn format(name: &str) -> Result<wardian_backend::Format, ConfigError> {
    name.parse().map_err(|e: wardian_backend::DiskError| bad("disk format", name, e.to_string()))
}

impl<'de> Deserialize<'de> for DiskArg {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            path: PathBuf,
            #[serde(default)]
            readonly: bool,
            format: Option<String>,
        }
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = DiskArg;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"PATH[,readonly][,format=raw|qcow2]\" or a table with path, readonly, format")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<DiskArg, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<DiskArg, A::Error> {
                let table = Table::deserialize(de::value::MapAccessDeserializer::new(map))?;
                let format = table.format.as_deref().map(format).transpose().map_err(de::Error::custom)?;
                Ok(DiskArg { path: table.path, readonly: table.readonly, format })
            }
        }
        from.deserialize_any(Either)
    }
}

/// A multiboot or PVH module: `PATH [its command line]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleArg {
    /// The file.
    pub path: PathBuf,
    /// Its command line.
    pub cmdline: String,
}

impl FromStr for ModuleArg {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<ModuleArg, ConfigError> {
        let (path, cmdline) = text.split_once(' ').unwrap_or((text, ""));
        if path.is_empty() {
            return Err(bad("module", text, "the path is missing"));
        }
        Ok(ModuleArg { path: path.into(), cmdline: cmdline.to_owned() })
    }
}
by_text!(ModuleArg, "a module: \"PATH [its command line]\"");

fn address<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Address>, D::Error> {
    struct Door(Address);
    impl FromStr for Door {
        type Err = wardian_gdb::GdbError;
        fn from_str(text: &str) -> Result<Door, Self::Err> {
            text.parse().map(Door)
        }
    }
    by_text!(Door, "a port or the path of a socket");
    Door::deserialize(from).map(|door| Some(door.0))
}

/// Everything that can be asked for; what is `None`, false or empty was not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Name of the machine, by which it is found; `vm-` and the process's number if not given.
    pub name: Option<String>,
    /// Kernel: bzImage, ELF with a PVH note, or multiboot.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Multiboot modules.
    #[serde(alias = "modules")]
    pub module: Vec<ModuleArg>,
    /// Disks, in order.
    #[serde(alias = "disks")]
    pub disk: Vec<DiskArg>,
    /// Guest RAM; 512M if not given.
    pub memory: Option<MemorySize>,
    /// vCPUs; 1 if not given.
    pub cpus: Option<CpuCount>,
    /// Engine; auto if not given.
    pub engine: Option<EngineChoice>,
    /// Processor model; host if not given.
    pub cpu: Option<String>,
    /// First serial port; stdio if not given and no other device has it.
    pub serial: Option<Endpoint>,
    /// Virtio console; none if not given.
    pub console: Option<Endpoint>,
    /// Debug console at port E9h (output only); stdio if not given.
    pub debug_console: Option<Endpoint>,
    /// Whether port F4h ends the machine.
    pub debug_exit: bool,
    /// What the guest tells through the doorbell at port 5C0h goes here, with the host's time.
    pub doorbell: Option<PathBuf>,
    /// The debugger's door.
    #[serde(deserialize_with = "address")]
    pub gdb: Option<Address>,
    /// vCPUs start only when a debugger says so.
    pub gdb_wait: bool,
    /// A reset ends the machine.
    pub no_reboot: bool,
    /// The machine begins paused.
    pub paused: bool,
    /// What guest time follows; host if not given.
    pub time: Option<TimeSource>,
    /// Interrupts that vCPU 0 takes in virtual time are written here.
    pub trace_interrupts: Option<PathBuf>,
    /// What becomes of ticks that come late; late-one if not given.
    pub timer_policy: TimerPolicies,
    /// Periodic timers tick at multiples of their period.
    pub timer_align: bool,
    /// The guest's time-stamp counter.
    pub tsc_mode: Option<TscModeArg>,
    /// What guest time does about a pause; advance if not given.
    pub on_resume: Option<OnResume>,
    /// How long a vCPU may make no progress; 20 seconds if not given.
    pub lockup_seconds: Option<LockupSeconds>,
    /// What happens is written here, as JSON lines.
    pub events: Option<PathBuf>,
    /// Counters are printed at the end.
    pub stats: bool,
    /// Counters are written here at the end, as JSON.
    pub stats_json: Option<PathBuf>,
}

impl Config {
    /// Reads a TOML file. Relative paths in it are relative to the file.
    ///
    /// # Errors
    /// Names the file, the line and the field.
    pub fn from_file(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config = Config::from_toml(&text, path)?;
        config.rebase(path.parent().unwrap_or(Path::new("")));
        Ok(config)
    }

    /// Parses TOML; `path` is for messages.
    ///
    /// # Errors
    /// Names the file, the line and the field.
    pub fn from_toml(text: &str, path: &Path) -> Result<Config, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start.min(text.len()));
            let before = text.get(..at).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let column = at - before.rfind('\n').map_or(0, |newline| newline + 1) + 1;
            let key =
                text.lines().nth(line - 1).and_then(|line| line.split_once('=')).map(|(key, _)| key.trim());
            let mut message = error.message().replace('\n', " ");
            if let Some(key) = key
                && !message.contains(&format!("`{key}`"))
            {
                message = format!("field `{key}`: {message}");
            }
            ConfigError::Parse { path: path.to_owned(), line, column, message }
        })
    }

    fn rebase(&mut self, folder: &Path) {
        let rebase = |path: &mut PathBuf| *path = folder.join(&*path);
        self.kernel.iter_mut().for_each(rebase);
        self.initrd.iter_mut().for_each(rebase);
        self.module.iter_mut().for_each(|module| rebase(&mut module.path));
        self.disk.iter_mut().for_each(|disk| rebase(&mut disk.path));
        self.stats_json.iter_mut().for_each(rebase);
        self.events.iter_mut().for_each(rebase);
        self.doorbell.iter_mut().for_each(rebase);
        self.trace_interrupts.iter_mut().for_each(rebase);
        for endpoint in [&mut self.serial, &mut self.console, &mut self.debug_console] {
            if let Some(Endpoint::File(path)) = endpoint {
                rebase(path);
            }
        }
        if let Some(Address::Path(path)) = &mut self.gdb {
            rebase(path);
        }
    }

    /// What `over` says, and what this says where `over` is silent. Disks and modules are this one's,
    /// followed by those of `over`.
    #[must_use]
    pub fn overridden_by(mut self, over: Config) -> Config {
        self.module.extend(over.module);
        self.disk.extend(over.disk);
        Config {
            name: over.name.or(self.name),
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            cmdline: over.cmdline.or(self.cmdline),
            module: self.module,
            disk: self.disk,
            memory: over.memory.or(self.memory),
            cpus: over.cpus.or(self.cpus),
            engine: over.engine.or(self.engine),
            cpu: over.cpu.or(self.cpu),
            serial: over.serial.or(self.serial),
            console: over.console.or(self.console),
            debug_console: over.debug_console.or(self.debug_console),
            debug_exit: over.debug_exit || self.debug_exit,
            doorbell: over.doorbell.or(self.doorbell),
            gdb: over.gdb.or(self.gdb),
            gdb_wait: over.gdb_wait || self.gdb_wait,
            no_reboot: over.no_reboot || self.no_reboot,
            paused: over.paused || self.paused,
            time: over.time.or(self.time),
            trace_interrupts: over.trace_interrupts.or(self.trace_interrupts),
            timer_policy: self.timer_policy.overridden_by(over.timer_policy),
            timer_align: over.timer_align || self.timer_align,
            tsc_mode: over.tsc_mode.or(self.tsc_mode),
            on_resume: over.on_resume.or(self.on_resume),
            lockup_seconds: over.lockup_seconds.or(self.lockup_seconds),
            events: over.events.or(self.events),
            stats: over.stats || self.stats,
            stats_json: over.stats_json.or(self.stats_json),
        }
    }

    /// The machine that this describes, defaults filled in.
    ///
    /// # Errors
    /// When fields contradict each other or the kernel is missing.
    pub fn check(self) -> Result<Plan, ConfigError> {
        let console = self.console.unwrap_or(Endpoint::None);
        let default_serial = if console == Endpoint::Stdio { Endpoint::None } else { Endpoint::Stdio };
        let serial = self.serial.unwrap_or(default_serial);
        if serial == Endpoint::Stdio && console == Endpoint::Stdio {
            return Err(ConfigError::TerminalTwice);
        }
        let cpus = self.cpus.map_or(1, |count| count.0 as usize);
        let counted = self.time == Some(TimeSource::Virtual);
        if counted && cpus > 1 {
            return Err(ConfigError::VirtualTimeCpus(cpus));
        }
        if self.trace_interrupts.is_some() && !counted {
            return Err(ConfigError::TraceNeedsVirtualTime);
        }
        Ok(Plan {
            name: match self.name {
                Some(name) => checked_name(name)?,
                None => format!("vm-{}", std::process::id()),
            },
            kernel: self.kernel.ok_or(ConfigError::NoKernel)?,
            initrd: self.initrd,
            cmdline: self.cmdline.unwrap_or_default(),
            modules: self.module,
            disks: self.disk,
            memory: self.memory.map_or(512 << 20, |size| size.0),
            cpus,
            engine: self.engine.unwrap_or_default(),
            cpu: self.cpu.unwrap_or_else(|| "host".to_owned()),
            serial,
            console,
            debug_console: self.debug_console.unwrap_or(Endpoint::Stdio),
            debug_exit: self.debug_exit,
            doorbell: self.doorbell,
            gdb_wait: self.gdb_wait && self.gdb.is_some(),
            gdb: self.gdb,
            no_reboot: self.no_reboot,
            paused: self.paused,
            counted,
            trace_interrupts: self.trace_interrupts,
            timers: self.timer_policy.resolve(self.timer_align),
            tsc: self.tsc_mode.unwrap_or_default().0,
            on_resume: self.on_resume.unwrap_or_default().0,
            lockup: self.lockup_seconds.unwrap_or_default().span(),
            events: self.events,
        })
    }
}

/// The name of a machine is that of its socket, too.
fn checked_name(name: String) -> Result<String, ConfigError> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins && name.len() <= 63 && name.bytes().all(fine) {
        return Ok(name);
    }
    Err(bad(
        "name for a machine",
        &name,
        "give 1 to 63 letters, digits, '.', '_' and '-', a letter or digit first",
    ))
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Name of the machine.
    pub name: String,
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Modules.
    pub modules: Vec<ModuleArg>,
    /// Disks.
    pub disks: Vec<DiskArg>,
    /// Guest RAM in bytes, a multiple of 4096.
    pub memory: u64,
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: usize,
    /// Engine.
    pub engine: EngineChoice,
    /// Processor model.
    pub cpu: String,
    /// First serial port.
    pub serial: Endpoint,
    /// Virtio console.
    pub console: Endpoint,
    /// Debug console.
    pub debug_console: Endpoint,
    /// Debug exit port.
    pub debug_exit: bool,
    /// Doorbell.
    pub doorbell: Option<PathBuf>,
    /// Debugger's door.
    pub gdb: Option<Address>,
    /// Wait for the debugger.
    pub gdb_wait: bool,
    /// A reset ends the machine.
    pub no_reboot: bool,
    /// It begins paused.
    pub paused: bool,
    /// Guest time is the count of instructions.
    pub counted: bool,
    /// Taken interrupts are written here.
    pub trace_interrupts: Option<PathBuf>,
    /// How the timers treat their ticks.
    pub timers: Timers,
    /// The guest's time-stamp counter.
    pub tsc: wardian_time::TscMode,
    /// What guest time does about a pause.
    pub on_resume: wardian_time::ResumePolicy,
    /// How long a vCPU may make no progress.
    pub lockup: Option<std::time::Duration>,
    /// What happens is written here.
    pub events: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::{Config, ConfigError, CpuCount, DiskArg, Endpoint, MemorySize, ModuleArg};
    use std::path::Path;

    fn parse(text: &str) -> Result<Config, String> {
        Config::from_toml(text, Path::new("guest.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn every_field_is_understood() {
        let config = parse(
            r#"
            name = "debian"
            kernel = "bzImage"
            initrd = "initrd.img"
            cmdline = "console=ttyS0 quiet"
            module = ["prog with arguments"]
            disk = ["a.img,readonly", { path = "b.qcow2", format = "qcow2" }]
            memory = "1G"
            cpus = 4
            engine = "soft"
            cpu = "host,-avx512f"
            serial = "none"
            console = "stdio"
            debug-console = "file:log"
            debug-exit = true
            doorbell = "rings.csv"
            gdb = 1234
            gdb-wait = true
            no-reboot = true
            paused = true
            time = "host"
            timer-policy = "sync,pit=replay"
            timer-align = true
            tsc-mode = "emulate"
            on-resume = "step:2s"
            lockup-seconds = 5
            events = "events.jsonl"
            stats = true
            stats-json = "out.json"
            "#,
        )
        .unwrap();
        assert_eq!(config.module, [ModuleArg { path: "prog".into(), cmdline: "with arguments".into() }]);
        assert!(config.disk[0].readonly && !config.disk[1].readonly);
        assert_eq!(config.disk[1].format, Some(wardian_backend::Format::Qcow2));
        assert_eq!(config.gdb, Some(wardian_gdb::Address::Port(1234)));
        assert!(config.stats && config.gdb_wait && config.debug_exit && config.no_reboot && config.paused);
        let plan = config.check().unwrap();
        assert_eq!((plan.memory, plan.cpus), (1 << 30, 4));
        assert_eq!(plan.timers.pit.policy, wardian_time::TickPolicy::Replay);
        assert_eq!(plan.on_resume, wardian_time::ResumePolicy::Step(wardian_time::Nanos(2_000_000_000)));
        assert_eq!(plan.lockup.map(|span| span.as_secs()), Some(5));
        assert!(plan.timers.lapic.align && plan.tsc == wardian_time::TscMode::Emulate);
        assert_eq!(plan.debug_console, Endpoint::File("log".into()));
        assert_eq!(plan.doorbell.as_deref(), Some(Path::new("rings.csv")));
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let table = [
            ("kernel = \"k\"\nkernle = \"x\"\n", "guest.toml:2:1: unknown field `kernle`"),
            ("cpus = 2\nmemory = \"12Q\"\n", "guest.toml:2:10: field `memory`: '12Q' is no memory size"),
            ("\n\ncpus = 0\n", "guest.toml:3:8: field `cpus`: '0' is no number of vCPUs: give 1 to 64"),
            ("cpus = 65\n", "guest.toml:1:8: field `cpus`"),
            ("debug-exit = 3\n", "guest.toml:1:14: field `debug-exit`: invalid type"),
            ("disk = [\"a,sync\"]\n", "field `disk`: 'a,sync' is no disk: 'sync' is no option"),
            ("disk = [{ path = \"a\", cache = true }]\n", "unknown field `cache`"),
            ("serial = \"pty\"\n", "field `serial`: 'pty' is no place"),
            ("gdb = 70000\n", "field `gdb`: '70000' is no address"),
            ("timer-policy = \"late\"\n", "guest.toml:1:16: field `timer-policy`: 'late' is no timer policy"),
            ("time = \"slow\"\n", "field `time`: 'slow' is no source of guest time: give host or virtual"),
            ("tsc-mode = \"fast\"\n", "field `tsc-mode`: 'fast' is no TSC mode"),
            ("on-resume = \"skip\"\n", "field `on-resume`: 'skip' is no policy for resuming"),
            ("lockup-seconds = 1\n", "field `lockup-seconds`: '1' is no time without progress"),
            ("kernel = \n", "guest.toml:1:"),
            ("kernel = \"a\"\nkernel = \"b\"\n", "guest.toml:2:1: "),
        ];
        for (text, want) in table {
            let error = parse(text).unwrap_err();
            assert!(error.contains(want), "{text:?}: {error}");
        }
    }

    #[test]
    fn memory_sizes() {
        let table = [
            ("512M", Some(512 << 20)),
            ("2g", Some(2 << 30)),
            ("2097152", Some(2 << 20)),
            ("64MiB", Some(64 << 20)),
            ("1M", None),
            ("0", None),
            ("", None),
            ("M", None),
            ("-5M", None),
            ("2097153", None),
            ("257G", None),
            ("99999999999999999999T", None),
            ("17179869184T", None),
        ];
        for (text, want) in table {
            assert_eq!(text.parse::<MemorySize>().ok().map(|m| m.0), want, "{text}");
        }
    }

    #[test]
    fn counts_disks_and_endpoints() {
        for bad in ["0", "65", "-1", "two", ""] {
            assert!(bad.parse::<CpuCount>().is_err(), "{bad}");
        }
        assert_eq!("64".parse::<CpuCount>().unwrap(), CpuCount(64));
        let disk: DiskArg = "my,,disk,format=raw".parse().unwrap();
        assert_eq!(disk.path, Path::new("my,disk"));
        assert!(",readonly".parse::<DiskArg>().is_err());
        assert!("a,format=vmdk".parse::<DiskArg>().is_err());
        assert!("file:".parse::<Endpoint>().is_err());
    }

    #[test]
    fn the_command_line_goes_over_the_file() {
        let file = parse("kernel = \"a\"\ncpus = 2\ndisk = [\"one\"]\nmemory = \"1G\"").unwrap();
        let mut line = Config { kernel: Some("b".into()), ..Config::default() };
        line.disk.push("two".parse().unwrap());
        let plan = file.overridden_by(line).check().unwrap();
        assert_eq!((plan.kernel.as_path(), plan.cpus, plan.memory), (Path::new("b"), 2, 1 << 30));
        assert_eq!(plan.disks.iter().map(|d| d.path.to_str().unwrap()).collect::<Vec<_>>(), ["one", "two"]);
        assert!(matches!(Config::default().check(), Err(ConfigError::NoKernel)));
        let both = Config {
            kernel: Some("k".into()),
            serial: Some(Endpoint::Stdio),
            console: Some(Endpoint::Stdio),
            ..Config::default()
        };
        assert!(matches!(both.check(), Err(ConfigError::TerminalTwice)));
        let virtual_time = |more: &str| parse(&format!("kernel = \"k\"\n{more}")).unwrap().check();
        assert!(virtual_time("time = \"virtual\"\ntrace-interrupts = \"t\"").unwrap().counted);
        let error = virtual_time("time = \"virtual\"\ncpus = 2").unwrap_err();
        assert!(matches!(error, ConfigError::VirtualTimeCpus(2)));
        assert!(matches!(virtual_time("trace-interrupts = \"t\""), Err(ConfigError::TraceNeedsVirtualTime)));
    }

    #[test]
    fn paths_in_a_file_are_relative_to_it() {
        let mut config = parse("kernel = \"k\"\ninitrd = \"/abs\"\nserial = \"file:log\"\n").unwrap();
        config.rebase(Path::new("/vm"));
        assert_eq!(config.kernel.as_deref(), Some(Path::new("/vm/k")));
        assert_eq!(config.initrd.as_deref(), Some(Path::new("/abs")));
        assert_eq!(config.serial, Some(Endpoint::File("/vm/log".into())));
    }
}
