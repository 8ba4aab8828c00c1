//! `cargo xtask stress mixed`: compilers, interpreters, databases, forks and disks in one machine for a long time, while
//! the memory that it takes beside guest RAM is watched.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::faults;
use crate::bench::footprint::Memory;
use crate::bench::vm::{self, Machine, Vmm};
use crate::bench::{SCRIPT, programs, report::median};
use crate::run::Step;

#[derive(clap::Args)]
pub struct Mixed {
    /// How long.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    #[command(flatten)]
    options: vm::Options,
    /// Where the console goes [default: target/stress/mixed.log].
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// Steps of the bench, over and over; two at a time on two vCPUs.
const STEPS: &str =
    "gcc python3 sqlite forkwait perl build node futex xz exec pingpong write read fault shell";
/// Memory is looked at so often.
const EVERY: Duration = Duration::from_secs(2);
/// Of the time: until then caches fill.
const WARM: f64 = 0.35;
/// What the last third may have more than the third after the first, of memory beside guest RAM: a share, and KiB.
const SHARE: f64 = 0.05;
const ABOVE: f64 = 4096.0;

pub fn main(args: &Mixed) -> Result<()> {
    let guest = vm::guest()?;
    let options = &args.options;
    let vmm = Vmm::Wardian {
        program: vm::wardian(options.wardian.as_deref())?,
        args: [&["--no-reboot".to_owned()], options.wardian_arg.as_slice()].concat(),
    };
    let log = match &args.log {
        Some(log) => log.clone(),
        None => super::logs()?.join("mixed.log"),
    };
    let place = guest.disk.with_file_name("mixed");
    fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
    let lock = File::create(place.join("lock"))?;
    lock.lock().context("Cannot lock the place of the stress test")?;
    let disk = place.join("root.img");
    vm::copy_disk(&guest.disk, &disk)?;
    programs::fit(&guest, &disk)?;
    let seconds = args.minutes * 60;
    let script = format!("while [ $SECONDS -lt {seconds} ]; do bash {SCRIPT} {STEPS} || exit 1; done");
    let machine = Machine {
        kernel: guest.kernel.clone(),
        initrd: guest.initrd.clone(),
        disk: disk.clone(),
        cmdline: format!(
            "{} panic=-1 {}",
            guest.cmdline,
            vm::run_parameter(&format!("exec bash -c '{script}'"))
        ),
        memory: options.memory.clone(),
        cpus: args.cpus,
    };
    let step = Step::begin(format!("Mixed work, {} minutes, {} vCPUs", args.minutes, args.cpus));
    let ran = vm::run(&vmm, &machine, Duration::from_secs(seconds) + options.limit(), Some(EVERY))?;
    step.end();
    fs::remove_file(&disk)?;
    fs::write(&log, ran.log()).with_context(|| format!("Cannot write {}", log.display()))?;

    let mut faults = faults(&ran);
    let texts: Vec<&str> = ran.lines.iter().map(|line| line.text.as_str()).collect();
    faults.extend(sums(&texts));
    let steps = texts.iter().filter(|text| text.contains("WARDIAN-END")).count();
    println!("{steps} steps in {:.0} s", ran.took.as_secs_f64());
    let memory = thirds(&ran.samples);
    for (name, [first, last]) in &memory {
        println!(
            "{name}: {:.1} MiB after the first third, {:.1} MiB in the last",
            first / 1024.0,
            last / 1024.0
        );
    }
    if memory.is_empty() {
        faults.push("memory was never seen".to_owned());
    }
    faults.extend(memory.iter().filter(|(_, pair)| grown(pair)).map(|(name, _)| format!("{name} has grown")));
    for fault in &faults {
        println!("fault: {fault}");
    }
    if !faults.is_empty() {
        bail!("{} faults; console: {}", faults.len(), log.display());
    }
    println!("No failure, no growth");
    Ok(())
}

/// Steps that failed, and those that did not compute the same each time.
fn sums(lines: &[&str]) -> Vec<String> {
    let mut sums: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut faults = Vec::new();
    for line in lines {
        let Some((_, text)) = line.split_once(vm::MARKER) else { continue };
        match text.split_ascii_whitespace().collect::<Vec<_>>()[..] {
            ["END", name, _, status] if status != "0" => faults.push(format!("{name} failed")),
            ["SUM", name, sum] => {
                let seen = sums.entry(name).or_default();
                if !seen.contains(&sum) {
                    seen.push(sum);
                }
            }
            _ => {}
        }
    }
    let differing = sums.iter().filter(|(_, seen)| seen.len() > 1);
    faults.extend(differing.map(|(name, seen)| format!("{name}: results differ: {}", seen.join(", "))));
    faults
}

/// Medians of the time after the first third and of the last third, in KiB.
fn thirds(samples: &[(Duration, Memory)]) -> Vec<(&'static str, [f64; 2])> {
    let Some(end) = samples.last().map(|(at, _)| at.as_secs_f64()) else { return Vec::new() };
    let of = |from: f64, to: f64, pick: fn(&Memory) -> u64| {
        let inside = samples.iter().filter(|(at, _)| (from * end..=to * end).contains(&at.as_secs_f64()));
        median(inside.map(|(_, memory)| pick(memory) as f64).collect())
    };
    type Kind = (&'static str, fn(&Memory) -> u64);
    let kinds: [Kind; 3] = [
        ("PSS beside guest RAM", |memory| memory.pss),
        ("RSS beside guest RAM", |memory| memory.rss),
        ("page tables of the host", |memory| memory.page_tables),
    ];
    let both = |pick| Some([of(WARM, (1.0 + WARM) / 2.0, pick)?, of((1.0 + WARM) / 2.0, 1.0, pick)?]);
    kinds.into_iter().filter_map(|(name, pick)| both(pick).map(|pair| (name, pair))).collect()
}

fn grown([first, last]: &[f64; 2]) -> bool {
    *last > first * (1.0 + SHARE) + ABOVE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_seen() {
        let samples = |at: fn(u64) -> u64| -> Vec<(Duration, Memory)> {
            (0..300)
                .map(|n| (Duration::from_secs(n), Memory { pss: at(n), rss: 1, guest: 1, page_tables: 1 }))
                .collect()
        };
        let seen = |at| thirds(&samples(at)).iter().any(|(_, pair)| grown(pair));
        assert!(!seen(|n| 50_000 + n.min(100) * 1000), "caches fill in the first third");
        assert!(!seen(|n| 100_000 + n % 7 * 500), "up and down");
        assert!(seen(|n| 50_000 + n * 100), "6 MiB a minute");
        assert!(thirds(&[]).is_empty());
    }

    #[test]
    fn results_that_differ() {
        let lines = ["WARDIAN-END gcc 1.0 0", "WARDIAN-SUM gcc 12", "WARDIAN-SUM xz 1", "WARDIAN-SUM gcc 12"];
        assert!(sums(&lines).is_empty());
        let bad = ["WARDIAN-SUM gcc 12", "WARDIAN-SUM gcc 13", "WARDIAN-END xz 1.0 1"];
        assert_eq!(sums(&bad), ["xz failed", "gcc: results differ: 12, 13"]);
    }
}
