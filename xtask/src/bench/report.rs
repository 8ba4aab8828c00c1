//! Medians, the table and the floors.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::Serialize;

use super::footprint::Peak;
use super::steps::{Measured, Times};

/// A boot may take this many times QEMU's time.
const BOOT_FLOOR: f64 = 1.5;
/// Steps that must take no more than QEMU's time.
const STEP_FLOORS: [&str; 2] = ["python3", "gcc"];
/// MiB beside guest RAM, with [`MEMORY_CPUS`].
const MEMORY_FLOOR: f64 = 256.0;
/// vCPUs of the runs that measure memory.
pub const MEMORY_CPUS: u32 = 2;
/// Name of the row of the boot.
pub const BOOT: &str = "boot";

/// What was measured for one step (or the boot) on one machine.
#[derive(Default, Serialize)]
pub struct Series {
    pub median: Option<Times>,
    pub runs: Vec<Times>,
}

/// One step, or the boot.
#[derive(Default, Serialize)]
pub struct Row {
    pub name: String,
    pub what: String,
    pub native: Series,
    pub qemu: Series,
    pub wardian: Series,
}

/// One of the floors.
#[derive(Debug, PartialEq, Serialize)]
pub struct Floor {
    pub what: String,
    pub measured: f64,
    pub at_most: f64,
    pub kept: bool,
}

/// Everything the command tells.
#[derive(Serialize)]
pub struct Report {
    pub linux: String,
    pub qemu: String,
    pub memory: String,
    pub cpus: u32,
    pub runs: u32,
    /// Load average of the host over the last minute, before and after.
    pub load: [f64; 2],
    pub rows: Vec<Row>,
    /// Beside guest RAM, with [`MEMORY_CPUS`] vCPUs.
    pub footprint: BTreeMap<&'static str, Peak>,
    pub floors: Vec<Floor>,
    /// Runs and steps that failed, results that differ.
    pub faults: Vec<String>,
}

/// Median of each of the times by itself.
pub fn series(runs: Vec<Times>) -> Series {
    let of = |pick: &dyn Fn(&Times) -> Option<f64>| median(runs.iter().filter_map(pick).collect());
    let median = of(&|t| Some(t.host)).zip(of(&|t| Some(t.guest)));
    let median = median.map(|(host, guest)| Times { host, guest, cpu: of(&|t| t.cpu) });
    Series { median, runs }
}

/// Median; of an even number the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let high = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { high } else { f64::midpoint(values[middle - 1], high) })
}

/// The series of one row out of the runs.
pub fn pick(runs: &[Measured], name: &str) -> Series {
    let one = |run: &Measured| if name == BOOT { run.boot.clone() } else { run.steps.get(name).cloned() };
    series(runs.iter().filter_map(one).collect())
}

/// Steps whose sums are not the same in all runs of all machines.
pub fn differing(machines: &[(&str, &[Measured])]) -> Vec<String> {
    let mut seen: BTreeMap<&str, BTreeMap<&str, Vec<&str>>> = BTreeMap::new();
    for (machine, runs) in machines {
        for (name, sum) in runs.iter().flat_map(|run| &run.sums).filter(|(name, _)| {
            // A failed step has been told already.
            !runs.iter().any(|run| run.failed.contains(name))
        }) {
            let who = seen.entry(name).or_default().entry(sum).or_default();
            if !who.contains(machine) {
                who.push(machine);
            }
        }
    }
    seen.retain(|_, sums| sums.len() > 1);
    seen.iter()
        .map(|(name, sums)| {
            let sums: Vec<String> =
                sums.iter().map(|(sum, who)| format!("{sum} ({})", who.join(", "))).collect();
            format!("{name}: results differ: {}", sums.join(", "))
        })
        .collect()
}

/// The floors that can be told from what was measured.
pub fn floors(rows: &[Row], footprint: Option<&Peak>) -> Vec<Floor> {
    let floor =
        |what: String, measured: f64, at_most| Floor { what, measured, at_most, kept: measured <= at_most };
    let mut floors = Vec::new();
    for row in rows {
        let at_most = match row.name.as_str() {
            BOOT => BOOT_FLOOR,
            name if STEP_FLOORS.contains(&name) => 1.0,
            _ => continue,
        };
        if let (Some(qemu), Some(ours)) = (&row.qemu.median, &row.wardian.median) {
            floors.push(floor(format!("{}, ours/QEMU", row.name), ours.host / qemu.host, at_most));
        }
    }
    if let Some(peak) = footprint {
        let what = format!("memory beside guest RAM, {MEMORY_CPUS} vCPUs, MiB");
        let mut memory = floor(what, mib(peak.memory.pss), MEMORY_FLOOR);
        memory.kept = memory.measured < memory.at_most;
        floors.push(memory);
    }
    floors
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn cell(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"))
}

fn ratio(over: Option<f64>, under: Option<f64>) -> String {
    let ratio = over.zip(under).filter(|(_, under)| *under > 0.0).map(|(over, under)| over / under);
    ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
}

/// The table of memory, if it was measured.
pub fn peaks(f: &mut fmt::Formatter<'_>, footprint: &BTreeMap<&'static str, Peak>) -> fmt::Result {
    if footprint.is_empty() {
        return Ok(());
    }
    writeln!(f, "\nPeak memory beside guest RAM with {MEMORY_CPUS} vCPUs, MiB")?;
    writeln!(f, "{:9}{:>9}{:>9}{:>13}{:>12}", "", "PSS", "RSS", "page tables", "guest RAM")?;
    for (machine, Peak { memory, .. }) in footprint {
        let [pss, rss, tables, guest] = [memory.pss, memory.rss, memory.page_tables, memory.guest].map(mib);
        writeln!(f, "{machine:9}{pss:>9.1}{rss:>9.1}{tables:>13.1}{guest:>12.1}")?;
    }
    Ok(())
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.cpus == 1 { "" } else { "s" };
        writeln!(f, "Linux {}, {} RAM, {} vCPU{plural}", self.linux, self.memory, self.cpus)?;
        writeln!(f, "QEMU: {}", self.qemu)?;
        let [before, after] = self.load;
        writeln!(f, "Medians of {} runs in turn; load of the host {before} to {after}", self.runs)?;
        writeln!(
            f,
            "Seconds by the host's clock (CPU: of the whole process; clock: guest's seconds in one)"
        )?;
        writeln!(
            f,
            "\n{:9}{:>9}{:>9}{:>9}{:>11}{:>13}{:>10}{:>10}{:>8}  what",
            "step", "native", "QEMU", "ours", "QEMU/ours", "ours/native", "CPU QEMU", "CPU ours", "clock"
        )?;
        for row in &self.rows {
            let host = |series: &Series| series.median.as_ref().map(|times| times.host);
            let cpu = |series: &Series| series.median.as_ref().and_then(|times| times.cpu);
            let (native, qemu, ours) = (host(&row.native), host(&row.qemu), host(&row.wardian));
            // A boot has no start that the guest knows of.
            let clock = row.wardian.median.as_ref().filter(|_| row.name != BOOT);
            writeln!(
                f,
                "{:9}{:>9}{:>9}{:>9}{:>11}{:>13}{:>10}{:>10}{:>8}  {}",
                row.name,
                cell(native),
                cell(qemu),
                cell(ours),
                ratio(qemu, ours),
                ratio(ours, native),
                cell(cpu(&row.qemu)),
                cell(cpu(&row.wardian)),
                ratio(clock.map(|times| times.guest), clock.map(|times| times.host)),
                row.what,
            )?;
            if row.name == BOOT {
                let up = |series: &Series| series.median.as_ref().map(|times| times.guest);
                let (qemu, ours) = (up(&row.qemu), up(&row.wardian));
                writeln!(
                    f,
                    "{:9}{:>9}{:>9}{:>9}{:>11}{:>41}  the guest's uptime then",
                    "",
                    "",
                    cell(qemu),
                    cell(ours),
                    ratio(qemu, ours),
                    ""
                )?;
            }
        }
        peaks(f, &self.footprint)?;
        writeln!(f)?;
        for floor in &self.floors {
            let kept = if floor.kept { "kept" } else { "MISSED" };
            writeln!(f, "floor {kept}: {}: {:.2}, at most {}", floor.what, floor.measured, floor.at_most)?;
        }
        for fault in &self.faults {
            writeln!(f, "fault: {fault}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::footprint::Memory;
    use super::*;

    fn times(host: f64) -> Times {
        Times { host, guest: host / 2.0, cpu: None }
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(series(vec![times(3.0), times(9.0), times(4.0)]).median, Some(times(4.0)));
    }

    #[test]
    fn floors_from_rows() {
        let row = |name: &str, qemu, ours| Row {
            name: name.to_owned(),
            qemu: series(vec![times(qemu)]),
            wardian: series(vec![times(ours)]),
            ..Row::default()
        };
        let peak = Peak { memory: Memory { pss: 256 * 1024, ..Memory::default() }, samples: 1 };
        let rows =
            [row("boot", 2.0, 2.9), row("python3", 1.0, 1.1), row("gcc", 4.0, 2.0), row("xz", 1.0, 9.0)];
        let kept: Vec<bool> = floors(&rows, Some(&peak)).iter().map(|floor| floor.kept).collect();
        assert_eq!(kept, [true, false, true, false]);
        assert!(floors(&rows[3..], None).is_empty());
    }

    #[test]
    fn results_that_differ() {
        let run = |sum: &str| {
            let mut run = Measured::default();
            run.sums.insert("gcc".to_owned(), sum.to_owned());
            run
        };
        let (a, b, mut c) = ([run("1"), run("1")], [run("1")], [run("2")]);
        assert!(differing(&[("QEMU", &a), ("ours", &b)]).is_empty());
        assert_eq!(
            differing(&[("QEMU", &a), ("native", &b), ("ours", &c)]),
            ["gcc: results differ: 1 (QEMU, native), 2 (ours)"]
        );
        c[0].failed.push("gcc".to_owned());
        assert!(differing(&[("QEMU", &a), ("ours", &c)]).is_empty());
    }
}
