//! `cargo xtask lockstep`: our engine and QEMU's translator step through the same bare-metal guest, one
//! instruction at a time, and the first register that differs is somebody's bug.
//!
//! Both are driven through their GDB stubs. They start at the guest's entry with equal general registers; from there
//! on every instruction must leave the same general registers, flags, segments, control and vector registers. What
//! tells of time, of the model of the processor or of a device cannot be the same: after such an instruction (they
//! are named in [`rules`]) our side gets QEMU's registers. The same goes for flags that the manual leaves undefined.

mod rsp;
mod rules;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::guests;
use crate::run::{Step, need};
use crate::start::wardian;
use rsp::{Client, Registers};
use rules::{FLAGS, Kind, Rules};

/// Guests that make sense in single steps on one processor: they do not wait for interrupts or other processors
/// before they have done much else, and do not rewrite their own code.
const GUESTS: [&str; 6] = ["hello", "strings", "fpu", "exceptions", "paging", "modes"];

/// Westmere is what QEMU's translator knows well; what it has, our model has as well.
const QEMU_CPU: &str = "Westmere,-kvm,+smep,+smap,+rdtscp,+pdpe1gb";
const OUR_CPU: &str = "x86-64-v2,+smep,+smap,+rdtscp,+pdpe1gb";

#[derive(clap::Args)]
pub struct Args {
    /// Only these guests; may be repeated [default: hello, strings, fpu, exceptions, paging, modes].
    #[arg(long, value_name = "NAME")]
    guest: Vec<String>,
    /// Most steps of each guest.
    #[arg(long, value_name = "N", default_value_t = 40_000)]
    steps: u64,
    /// Few steps of few guests: for the tests.
    #[arg(long)]
    quick: bool,
    /// Our side gets this register wrong after so many steps (REGISTER:STEPS), to see that it is noticed.
    #[arg(long, value_name = "REGISTER:STEPS")]
    plant: Option<String>,
    /// Our program, if not the one of this repository.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
}

/// Ends the program with it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn main(args: &Args) -> Result<()> {
    need(&[("qemu-system-x86_64", "qemu-system-x86")])?;
    let ours = args.wardian.clone().map_or_else(wardian, Ok)?;
    let names: Vec<String> = match (args.guest.is_empty(), args.quick) {
        (false, _) => args.guest.clone(),
        (_, true) => vec!["exceptions".into()],
        _ => GUESTS.map(str::to_owned).into(),
    };
    let plant = args.plant.as_deref().map(parse_plant).transpose()?;
    let kernels = guests::build(&names)?;
    let mut total = 0;
    for kernel in kernels {
        let steps = if args.quick { args.steps.min(30_000) } else { args.steps };
        total += one(&ours, &kernel, steps, plant.as_ref())?;
    }
    println!("{total} instructions in lock step: no difference");
    Ok(())
}

fn parse_plant(text: &str) -> Result<(String, u64)> {
    let (name, at) = text.split_once(':').context("--plant wants REGISTER:STEPS")?;
    Ok((name.to_owned(), at.parse().context("--plant wants a number of steps")?))
}

/// Address of the first instruction of an ELF file.
fn entry(kernel: &Path) -> Result<u64> {
    let bytes = std::fs::read(kernel)?;
    let field = bytes.get(24..32).and_then(|field| field.try_into().ok());
    Ok(u64::from_le_bytes(field.with_context(|| format!("{} is no ELF file", kernel.display()))?))
}

fn start(ours: &Path, kernel: &Path, folder: &Path) -> Result<(Running, Running, Client, Client)> {
    let (our_door, qemu_door) = (folder.join("ours"), folder.join("qemu"));
    let quiet = |command: &mut Command| -> Result<Running> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Running(command.spawn().with_context(|| format!("Cannot start {command:?}"))?))
    };
    let mut command = Command::new(ours);
    command.args(["run", "--memory", "128M", "--serial", "none", "--debug-console", "none", "--debug-exit"]);
    command.args(["--no-reboot", "--gdb-wait", "--cpu", OUR_CPU]);
    command.arg("--kernel").arg(kernel).arg("--gdb").arg(&our_door);
    let us = quiet(&mut command)?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-accel",
        "tcg",
        "-M",
        "pc",
        "-cpu",
        QEMU_CPU,
        "-m",
        "128",
        "-nodefaults",
        "-display",
        "none",
    ]);
    command.args(["-no-reboot", "-S", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command.arg("-kernel").arg(kernel);
    command.arg("-gdb").arg(format!("unix:{},server=on,wait=off", qemu_door.display()));
    let them = quiet(&mut command)?;
    let (our, their) = (Client::connect(&our_door)?, Client::connect(&qemu_door)?);
    Ok((us, them, our, their))
}

/// What is compared, in the order in which it is told.
const COMPARED: [&str; 34] = [
    "rip",
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "eflags",
    "cs",
    "ss",
    "ds",
    "es",
    "fs",
    "gs",
    "fs_base",
    "gs_base",
    "k_gs_base",
    "cr0",
    "cr2",
    "cr3",
    "cr4",
    "cr8",
    "efer",
    "mxcsr",
];
const GENERAL: [&str; 16] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

struct Pair {
    our: Client,
    their: Client,
    rules: Rules,
    /// Registers that the two loaders may leave different: compared from when they are first equal.
    settled: Vec<String>,
    reasons: BTreeMap<&'static str, u64>,
}

/// How a step ended.
enum Stepped {
    Both(Registers, Registers),
    /// A machine has ended.
    Over,
}

impl Pair {
    fn registers(&mut self) -> Result<(Registers, Registers)> {
        self.our.send("g")?;
        self.their.send("g")?;
        Ok((self.our.registers()?, self.their.registers()?))
    }

    fn step(&mut self, rip: u64) -> Result<Stepped> {
        self.our.send("s")?;
        self.their.send("s")?;
        let (us, them) = (self.our.receive()?, self.their.receive()?);
        let stopped = |answer: &Option<Vec<u8>>| {
            answer.as_ref().is_some_and(|a| matches!(a.first(), Some(b'T' | b'S')))
        };
        if !stopped(&us) || !stopped(&them) {
            // The write to the exit port ends QEMU in the middle of the step, us behind it.
            if stopped(&us) != stopped(&them) && !self.rules.is_output(rip) {
                bail!("One machine ended at {rip:#x} and the other did not (ours: {us:?}, QEMU's: {them:?})");
            }
            return Ok(Stepped::Over);
        }
        let (us, them) = self.registers()?;
        Ok(Stepped::Both(us, them))
    }

    /// QEMU's translator now and then comes back from a step before it has done anything (it has to translate again
    /// first): it gets another.
    fn nudge(&mut self, before: &Registers, us: &Registers, them: &mut Registers) -> Result<()> {
        for _ in 0..3 {
            if *them != *before || us.get("rip") == them.get("rip") {
                break;
            }
            self.their.ask("s")?;
            self.their.send("g")?;
            *them = self.their.registers()?;
            *self.reasons.entry("steps that QEMU did not make").or_default() += 1;
        }
        Ok(())
    }

    /// A repeated string instruction at `rip` is done on both sides.
    fn finish_repeated(&mut self, rip: u64, us: &mut Registers, them: &mut Registers) -> Result<()> {
        for (client, registers) in [(&mut self.our, us), (&mut self.their, them)] {
            let mut left = 1_000_000;
            while registers.get("rip") == rip && left > 0 {
                client.ask("s")?;
                client.send("g")?;
                *registers = client.registers()?;
                left -= 1;
            }
        }
        Ok(())
    }

    fn learn(&mut self, rip: u64, registers: &Registers) -> Result<()> {
        if !self.rules.known(rip) {
            let bytes = self.their.memory(rip, 15)?;
            let bitness = Rules::bitness(registers);
            // (Compatibility mode.)
            let bitness = if bitness == 64 && upper_hidden(registers) { 32 } else { bitness };
            self.rules.learn(rip, &bytes, bitness);
        }
        Ok(())
    }

    /// The names of what differs.
    fn differences(&mut self, us: &Registers, them: &Registers, undefined: u64) -> Vec<String> {
        let mut names: Vec<String> = COMPARED.map(str::to_owned).into();
        names.extend((0..16).map(|n| format!("xmm{n}")));
        // Outside 64-bit code QEMU's stub shows the upper registers as zero.
        let hidden = upper_hidden(them);
        let mut found = Vec::new();
        for name in names {
            let (Some(a), Some(b)) = (us.0.get(&name), them.0.get(&name)) else { continue };
            if hidden && is_upper(&name) {
                continue;
            }
            let mask = if name == "eflags" { u128::from(FLAGS & !undefined) } else { u128::MAX };
            if (a ^ b) & mask == 0 {
                if !self.settled.contains(&name) {
                    self.settled.push(name);
                }
            } else if self.settled.contains(&name) {
                found.push(name);
            }
        }
        found
    }

    /// Gives our side QEMU's general registers and flags.
    fn follow(&mut self, us: &mut Registers, them: &Registers) -> Result<()> {
        let hidden = upper_hidden(them);
        for name in GENERAL.iter().copied().chain(["eflags"]).filter(|name| !hidden || !is_upper(name)) {
            let (was, is) = (us.0.get(name).copied(), them.0.get(name).copied());
            if let Some(is) = is
                && was != Some(is)
            {
                self.our.write_register(name, is)?;
                us.0.insert(name.to_owned(), is);
            }
        }
        Ok(())
    }

    /// Both at the guest's entry, with QEMU's boot information on both sides.
    fn align(&mut self, at: u64) -> Result<(Registers, Registers)> {
        self.our.run_to(at)?;
        self.their.run_to(at)?;
        let (mut us, them) = self.registers()?;
        let info = them.get("rbx");
        let table = self.their.memory(info, 88)?;
        let word = |offset: usize| {
            table.get(offset..offset + 4).map_or(0, |w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]))
        };
        let mut parts = vec![(info, 88), (u64::from(word(48)), word(44) as usize)];
        parts.extend([16, 64].map(|pointer| (u64::from(word(pointer)), 128)));
        for (start, len) in parts.into_iter().filter(|part| part.0 != 0 && part.1 != 0) {
            for offset in (0..len).step_by(256) {
                let at = start + offset as u64;
                let bytes = self.their.memory(at, 256.min(len - offset))?;
                self.our.write_memory(at, &bytes)?;
            }
        }
        self.follow(&mut us, &them)?;
        self.settled = GENERAL
            .iter()
            .map(|name| (*name).to_owned())
            .chain(["rip".to_owned(), "eflags".to_owned()])
            .collect();
        Ok((us, them))
    }
}

/// R8 to R15 and XMM8 to XMM15.
fn is_upper(name: &str) -> bool {
    let number =
        name.strip_prefix("xmm").or(name.strip_prefix('r')).and_then(|number| number.parse::<u32>().ok());
    number.is_some_and(|number| number >= 8)
}

fn upper_hidden(registers: &Registers) -> bool {
    registers.0.iter().filter(|(name, _)| is_upper(name)).all(|(_, value)| *value == 0)
}

fn one(ours: &Path, kernel: &Path, most: u64, plant: Option<&(String, u64)>) -> Result<u64> {
    let name = kernel.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let progress = Step::begin(format!("Lock step: {name}"));
    let folder = tempfile::tempdir()?;
    let (_us, _them, our, their) = start(ours, kernel, folder.path())?;
    let mut pair = Pair { our, their, rules: Rules::new(), settled: Vec::new(), reasons: BTreeMap::new() };
    let (mut before_us, mut before_them) = pair.align(entry(kernel)?)?;
    let mut ended = "the number of steps that was asked for";
    let mut count = 0;
    while count < most {
        let rip = before_them.get("rip");
        pair.learn(rip, &before_them)?;
        let kind = pair.rules.kind(rip, &before_them);
        if kind == Kind::Halt {
            ended = "HLT";
            break;
        }
        if let Some((register, _)) = plant.filter(|(_, at)| *at == count) {
            let wrong = before_us.0.get(register).copied().unwrap_or(0) ^ 1;
            pair.our.write_register(register, wrong)?;
        }
        let Stepped::Both(mut us, mut them) = pair.step(rip)? else {
            ended = "the end of the guest";
            break;
        };
        count += 1;
        pair.nudge(&before_them, &us, &mut them)?;
        if kind == Kind::Repeated {
            pair.finish_repeated(rip, &mut us, &mut them)?;
        }
        let undefined = pair.rules.undefined_flags(rip);
        let different = pair.differences(&us, &them, undefined);
        if let Kind::Outside(what) = kind {
            if different.iter().any(|name| name == "rip" || name == "rsp" || name == "cs") {
                report(&pair, rip, &different, [&before_us, &us], [&before_them, &them]);
                bail!("{name}: after {count} steps the two go different ways");
            }
            if !different.is_empty() {
                *pair.reasons.entry(what).or_default() += 1;
            }
            pair.follow(&mut us, &them)?;
        } else if rules::resume_flag(pair.rules.instruction(rip), &different, &us, &them) {
            *pair.reasons.entry("RF in the frame of a fault, which QEMU does not set").or_default() += 1;
            pair.follow(&mut us, &them)?;
        } else if let Some(reason) =
            rules::known(&name, &pair.rules.text(rip), count).filter(|_| !different.is_empty())
        {
            ended = reason;
            break;
        } else if !different.is_empty() {
            report(&pair, rip, &different, [&before_us, &us], [&before_them, &them]);
            bail!("{name}: after {count} steps the two differ in {}", different.join(", "));
        } else if (us.get("eflags") ^ them.get("eflags")) & undefined != 0 {
            *pair.reasons.entry("undefined flags").or_default() += 1;
            pair.follow(&mut us, &them)?;
        }
        if count.is_multiple_of(500) {
            progress.say(&format!("{count} steps, at {rip:#x}"));
        }
        (before_us, before_them) = (us, them);
    }
    progress.end();
    let reasons: Vec<String> = pair.reasons.iter().map(|(what, n)| format!("{what} {n}")).collect();
    let reasons = if reasons.is_empty() { "nothing".to_owned() } else { reasons.join(", ") };
    println!("{name}: {count} steps, up to {ended}; taken from QEMU: {reasons}");
    Ok(count)
}

fn report(pair: &Pair, rip: u64, different: &[String], us: [&Registers; 2], them: [&Registers; 2]) {
    let bytes: Vec<String> = match pair.rules.instruction(rip) {
        Some(insn) => vec![format!("{} bytes", insn.len()), pair.rules.text(rip)],
        None => vec!["?".to_owned()],
    };
    eprintln!("At {rip:#x}: {}", bytes.join(": "));
    eprintln!("{:>10} {:>34} {:>34} {:>34}", "register", "before (QEMU)", "after (Wardian)", "after (QEMU)");
    for name in different {
        let of = |registers: &Registers| {
            registers.0.get(name).map_or("-".to_owned(), |value| format!("{value:#x}"))
        };
        eprintln!("{name:>10} {:>34} {:>34} {:>34}", of(them[0]), of(us[1]), of(them[1]));
    }
}
