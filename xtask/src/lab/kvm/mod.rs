//! `cargo xtask lab kvm`: a true `/dev/kvm` on any machine. QEMU's translator runs Debian on a processor with SVM;
//! Debian's own `kvm_amd` drives that; our program runs guests on it.
//!
//! *Comes in*: the stock guests, our program, the bare-metal guests. *Goes out*: a table on standard output, the
//! whole console and a report as JSON in a folder, an exit status that tells whether every case went well.

mod disk;
mod peers;
mod report;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use self::report::Report;
use crate::bench::vm::{self, run_parameter};
use crate::guest::{self, Kernel};
use crate::run::{Step, need, repository};

/// The lab's processor.
const PROCESSOR: &str = "EPYC,+svm,+npt";

#[derive(clap::Args)]
pub struct Args {
    /// What is done in the lab [default: all].
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Engines of the conformance suite (the software engine's own is `cargo xtask test`, on the true processor).
    #[arg(long, value_name = "E,...", value_delimiter = ',', default_value = "kvm")]
    engines: Vec<String>,
    /// Rounds of the figures.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: u32,
    /// Minutes that the lab may take.
    #[arg(long, value_name = "M", default_value_t = 10)]
    limit: u64,
    /// Where the console and the report go [default: target/lab/kvm].
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// `wardian doctor`.
    Doctor,
    /// The bare-metal guests on every engine.
    Conformance,
    /// The stock guest with 1 and 2 vCPUs.
    Boots,
    /// What a host lacks is said in one line.
    Refusals,
    /// Time to init beside QEMU on the same KVM, time to the first guest instruction, memory.
    Figures,
}

const ALL: [Part; 5] = [Part::Doctor, Part::Conformance, Part::Boots, Part::Refusals, Part::Figures];

impl Part {
    /// Its function in `lab.sh`.
    fn function(self) -> &'static str {
        match self {
            Part::Doctor => "doctor",
            Part::Conformance => "conformance",
            Part::Boots => "boots",
            Part::Refusals => "refusals",
            Part::Figures => "figures",
        }
    }
}

pub fn main(args: &Args) -> Result<()> {
    need(&[("qemu-system-x86_64", "qemu-system-x86"), ("mke2fs", "e2fsprogs")])?;
    let parts = if args.parts.is_empty() { ALL.to_vec() } else { args.parts.clone() };
    let out = args.out.clone().unwrap_or_else(|| repository().join("target/lab/kvm"));
    fs::create_dir_all(&out).with_context(|| format!("Cannot create {}", out.display()))?;
    let host = guest::kernel(Kernel::Full)?;
    let inner = guest::debian(Kernel::Cloud)?;
    let root = inner.disk.clone().context("The guest has no disk")?;
    let wardian = vm::wardian(args.wardian.as_deref())?;
    let guests = crate::guests::build(&[])?;

    let image = out.join("lab.img");
    let step = Step::begin("The lab's disk");
    disk::make(
        &image,
        &step,
        &disk::Content {
            wardian: &wardian,
            guests: &guests,
            modules: &host,
            kernel: &inner,
            peers: parts.contains(&Part::Figures),
        },
    )?;
    step.end();

    let functions: Vec<&str> = parts.iter().map(|part| part.function()).collect();
    let script = format!(
        "mkdir -p /lab; mount /dev/vdb /lab; PARTS='{}' ENGINES='{}' ROUNDS={} sh /lab/lab.sh\n",
        functions.join(" "),
        args.engines.join(" "),
        args.rounds
    );
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    // Also where it can be read while the lab runs.
    let live = out.join("live.log").display().to_string().replace(',', ",,");
    qemu.arg("-chardev")
        .arg(format!("stdio,id=console,signal=off,logfile={live}"))
        .args(["-serial", "chardev:console"]);
    // MTTCG's time-stamp counter is the host's, on every processor: Linux cannot measure that under load.
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-smp", "2", "-m", "2G", "-M", "q35"]);
    qemu.arg("-kernel").arg(&host.kernel).arg("-initrd").arg(&host.initrd);
    qemu.arg("-append").arg(format!(
        "{} tsc=reliable mitigations=off quiet panic=-1 {}",
        host.cmdline,
        run_parameter(&script)
    ));
    for (name, path) in [("root", &root), ("lab", &image), ("guest", &root)] {
        let path = path.display().to_string().replace(',', ",,");
        qemu.arg("-drive").arg(format!("file={path},format=raw,if=none,id={name},snapshot=on"));
        qemu.arg("-device").arg(format!("virtio-blk-pci,drive={name}"));
    }
    qemu.stderr(Stdio::inherit());
    let step = Step::begin(format!("The lab: {}", functions.join(", ")));
    let ran = vm::run_command(&mut qemu, Duration::from_secs(60 * args.limit), None)?;
    step.end();
    let console = out.join("console.log");
    fs::write(&console, ran.log())?;

    let report = Report::of(ran.lines.iter().map(|line| line.text.as_str()));
    fs::write(out.join("report.json"), serde_json::to_string_pretty(&report)?)?;
    print!("{report}");
    println!("console {}", console.display());
    if ran.status.is_none() {
        bail!("The lab did not end within {} minutes", args.limit);
    }
    let faults = report.faults();
    if !faults.is_empty() {
        bail!("{} of {} cases failed: {}", faults.len(), report.cases.len(), faults.join(", "));
    }
    Ok(())
}
