//! The whole bench's table: times, ratios, means by class, counters.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::Serialize;

use super::counters::{self, Counters};
use super::footprint::Peak;
use super::promise::{PAIRS, Promise, scaling};
use super::report::{Row, Series, peaks};

/// One row with its class.
#[derive(Default, Serialize)]
pub struct Work {
    #[serde(flatten)]
    pub row: Row,
    pub class: String,
    pub cpus: u32,
    /// What our engine counted in it.
    pub counters: Counters,
}

/// Geometric means of ratios over some rows; None where no row has both.
#[derive(Debug, PartialEq, Serialize)]
pub struct Means {
    pub qemu_over_ours: Option<f64>,
    /// The same of the CPU times of the two processes.
    pub qemu_over_ours_cpu: Option<f64>,
    pub ours_over_native: Option<f64>,
}

/// Everything the whole bench tells.
#[derive(Default, Serialize)]
pub struct Table {
    pub linux: String,
    pub qemu: String,
    pub memory: String,
    pub rounds: u32,
    /// Load average of the host over the last minute, before and after.
    pub load: [f64; 2],
    pub works: Vec<Work>,
    /// By class, and `all`.
    pub means: BTreeMap<String, Means>,
    /// Beside guest RAM.
    pub footprint: BTreeMap<&'static str, Peak>,
    pub promises: Vec<Promise>,
    /// Runs and steps that failed, results that differ.
    pub faults: Vec<String>,
}

fn host(series: &Series) -> Option<f64> {
    series.median.as_ref().map(|times| times.host)
}

fn cpu(series: &Series) -> Option<f64> {
    series.median.as_ref().and_then(|times| times.cpu)
}

fn over(above: Option<f64>, below: Option<f64>) -> Option<f64> {
    above.zip(below).filter(|(above, below)| *above > 0.0 && *below > 0.0).map(|(above, below)| above / below)
}

impl Work {
    pub fn qemu_over_ours(&self) -> Option<f64> {
        over(host(&self.row.qemu), host(&self.row.wardian))
    }
    fn qemu_over_ours_cpu(&self) -> Option<f64> {
        over(cpu(&self.row.qemu), cpu(&self.row.wardian))
    }
    pub fn ours_over_native(&self) -> Option<f64> {
        over(host(&self.row.wardian), host(&self.row.native))
    }
    /// Seconds that ours took.
    pub fn ours(&self) -> Option<f64> {
        host(&self.row.wardian)
    }
    pub fn qemu_over_native(&self) -> Option<f64> {
        over(host(&self.row.qemu), host(&self.row.native))
    }
}

/// Means by class and over all.
pub fn means(works: &[Work]) -> BTreeMap<String, Means> {
    let of = |works: &[&Work]| Means {
        qemu_over_ours: geomean(works.iter().filter_map(|work| work.qemu_over_ours())),
        qemu_over_ours_cpu: geomean(works.iter().filter_map(|work| work.qemu_over_ours_cpu())),
        ours_over_native: geomean(works.iter().filter_map(|work| work.ours_over_native())),
    };
    let mut classes: BTreeMap<String, Vec<&Work>> = BTreeMap::new();
    for work in works {
        classes.entry(work.class.clone()).or_default().push(work);
    }
    let mut means: BTreeMap<String, Means> =
        classes.iter().map(|(class, works)| (class.clone(), of(works))).collect();
    means.insert("all".to_owned(), of(&works.iter().collect::<Vec<_>>()));
    means
}

fn geomean(ratios: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = ratios.fold((0.0, 0_u32), |(sum, count), ratio| (sum + ratio.ln(), count + 1));
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// Columns of the counters, each with the engine's name for it.
const COLUMNS: [(&str, &str); 11] = [
    ("translated", "translations"),
    ("in it, us", "translation_us"),
    ("lookups", "lookups"),
    ("TLB miss", "tlb_misses"),
    ("TLB flush", "tlb_flushes"),
    ("cache flush", "cache_flushes"),
    ("slow access", "slow_accesses"),
    ("interpreted", "interpreted"),
    ("syscalls", "syscalls"),
    ("exceptions", "exceptions"),
    ("interrupts", "interrupts"),
];

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Linux {}, {} RAM, 1 vCPU (x2: 2 vCPUs); QEMU: {}", self.linux, self.memory, self.qemu)?;
        let [before, after] = self.load;
        writeln!(f, "Medians of {} rounds in turn; load of the host {before} to {after}", self.rounds)?;
        writeln!(f, "Seconds by the host's clock; by CPU: the same ratio of both processes' CPU times\n")?;
        writeln!(
            f,
            "{:12}{:8}{:>9}{:>9}{:>9}{:>11}{:>8}{:>13}  what",
            "row", "class", "native", "QEMU", "ours", "QEMU/ours", "by CPU", "ours/native"
        )?;
        for work in &self.works {
            let name = format!("{}{}", work.row.name, if work.cpus > 1 { " x2" } else { "" });
            writeln!(
                f,
                "{:12}{:8}{:>9}{:>9}{:>9}{:>11}{:>8}{:>13}  {}",
                name,
                work.class,
                cell(host(&work.row.native), 3),
                cell(host(&work.row.qemu), 3),
                cell(host(&work.row.wardian), 3),
                cell(work.qemu_over_ours(), 2),
                cell(work.qemu_over_ours_cpu(), 2),
                cell(work.ours_over_native(), 2),
                work.row.what
            )?;
        }
        writeln!(f)?;
        for (class, means) in &self.means {
            writeln!(
                f,
                "{:12}{:8}{:>38}{:>8}{:>13}",
                "geomean",
                class,
                cell(means.qemu_over_ours, 2),
                cell(means.qemu_over_ours_cpu, 2),
                cell(means.ours_over_native, 2)
            )?;
        }
        for (two, one) in PAIRS {
            let of = |series: fn(&Row) -> &Series| {
                cell(scaling(&self.works, two, one, |work| host(series(&work.row))), 2)
            };
            let [native, qemu, ours] = [of(|row| &row.native), of(|row| &row.qemu), of(|row| &row.wardian)];
            if ours != "-" {
                writeln!(f, "{:20}{native:>9}{qemu:>9}{ours:>9}  {two} against {one}", "scaling, 2 vCPUs")?;
            }
        }
        peaks(f, &self.footprint)?;
        if self.works.iter().any(|work| !work.counters.is_empty()) {
            write!(f, "\nCounters of our engine\n{:12}", "row")?;
            for (title, _) in COLUMNS {
                write!(f, "{title:>12}")?;
            }
            writeln!(f, "  exits")?;
            for work in self.works.iter().filter(|work| !work.counters.is_empty()) {
                write!(f, "{:12}", work.row.name)?;
                for (_, name) in COLUMNS {
                    let count = work.counters.get(name).copied().map_or_else(|| "-".into(), counters::short);
                    write!(f, "{count:>12}")?;
                }
                writeln!(f, "  {}", counters::exits(&work.counters))?;
            }
        }
        writeln!(f)?;
        let (kept, missed): (Vec<_>, Vec<_>) = self.promises.iter().partition(|promise| promise.kept);
        writeln!(f, "promises: {} kept, {} missed", kept.len(), missed.len())?;
        for Promise { what, measured, promised, .. } in missed {
            writeln!(f, "promise MISSED: {what}: {measured:.2}, promised {promised}")?;
        }
        for fault in &self.faults {
            writeln!(f, "fault: {fault}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::report::series;
    use super::super::steps::Times;
    use super::*;

    pub fn work(name: &str, class: &str, native: f64, qemu: f64, ours: f64) -> Work {
        let one = |host| series(vec![Times { host, guest: host, cpu: Some(host / 2.0) }]);
        let row = Row {
            name: name.to_owned(),
            native: one(native),
            qemu: one(qemu),
            wardian: one(ours),
            ..Row::default()
        };
        Work { row, class: class.to_owned(), cpus: 1, ..Work::default() }
    }

    #[test]
    fn means_by_class() {
        let mut works = vec![
            work("a", "float", 1.0, 8.0, 2.0),
            work("b", "float", 1.0, 9.0, 1.0),
            work("c", "user", 1.0, 6.0, 1.0),
        ];
        works.push(Work { class: "disk".into(), ..Work::default() });
        let means = means(&works);
        let near = |value: Option<f64>, want: f64| value.is_some_and(|value| (value - want).abs() < 1e-9);
        assert!(near(means["float"].qemu_over_ours, 6.0), "{means:?}");
        assert!(near(means["user"].qemu_over_ours_cpu, 6.0), "{means:?}");
        assert!(near(means["all"].qemu_over_ours, 6.0), "{means:?}");
        assert!(near(means["float"].ours_over_native, 2.0_f64.sqrt()), "{means:?}");
        assert_eq!(means["disk"].qemu_over_ours, None);
    }
}
