//! What is promised of the whole bench, and whether it is kept.

use serde::Serialize;

use super::report::BOOT;
use super::table::{Table, Work};

/// QEMU/ours of all rows together (geometric mean).
const ALL: f64 = 4.0;
/// QEMU/ours of each row, by class; 1 of all others. The boot's is half of QEMU's time.
const ROWS: [(&str, f64); 5] =
    [("float", 10.0), ("user", 2.5), ("kernel", 2.0), ("disk", 0.8), ("boot", 2.0)];
/// ours/native of all rows together.
const NATIVE: f64 = 4.0;
/// ours/native of rows that compute.
const NATIVE_COMPUTE: f64 = 2.5;
const COMPUTE: [&str; 2] = ["float", "user"];
/// Two jobs at once on 2 vCPUs against one on 1: how much more is done in the same time.
const SCALING: f64 = 1.8;
/// Rows with two jobs, and that with one of them.
pub const PAIRS: [(&str, &str); 2] = [("pair", "nbody"), ("build", "gcc")];

/// One promise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Promise {
    pub what: String,
    pub measured: f64,
    pub promised: f64,
    pub kept: bool,
}

fn at_least(what: String, measured: Option<f64>, promised: f64) -> Option<Promise> {
    measured.map(|measured| Promise { what, measured, promised, kept: measured >= promised })
}

fn at_most(what: String, measured: Option<f64>, promised: f64) -> Option<Promise> {
    measured.map(|measured| Promise { what, measured, promised, kept: measured <= promised })
}

/// Those that what was measured can tell of. Means need all rows: `whole`.
pub fn promises(table: &Table, whole: bool) -> Vec<Promise> {
    let mut all = Vec::new();
    if whole && let Some(means) = table.means.get("all") {
        all.push(at_least("QEMU/ours, geomean".into(), means.qemu_over_ours, ALL));
        all.push(at_most("ours/native, geomean".into(), means.ours_over_native, NATIVE));
    }
    for work in &table.works {
        let name = &work.row.name;
        let least = ROWS.iter().find(|(class, _)| *class == work.class).map_or(1.0, |(_, least)| *least);
        all.push(at_least(format!("QEMU/ours, {name}"), work.qemu_over_ours(), least));
        if COMPUTE.contains(&work.class.as_str()) && name != BOOT {
            all.push(at_most(format!("ours/native, {name}"), work.ours_over_native(), NATIVE_COMPUTE));
        }
    }
    for (two, one) in PAIRS {
        all.push(at_least(format!("scaling, {two}"), scaling(&table.works, two, one, Work::ours), SCALING));
    }
    all.into_iter().flatten().collect()
}

/// How much more of the job of row `one` is done in the same time where row `two` does two of it at once.
pub fn scaling(works: &[Work], two: &str, one: &str, time: impl Fn(&Work) -> Option<f64>) -> Option<f64> {
    let find = |name: &str| works.iter().find(|work| work.row.name == name).and_then(&time);
    find(two).zip(find(one)).map(|(two, one)| 2.0 * one / two)
}

#[cfg(test)]
mod tests {
    use super::super::table::{self, tests::work};
    use super::*;

    #[test]
    fn kept_and_missed() {
        let works = vec![
            work("boot", "boot", 1.0, 4.0, 2.0),
            work("nbody", "float", 1.0, 20.0, 2.0),
            work("pair", "float", 1.0, 20.0, 2.4),
            work("xz", "user", 1.0, 5.0, 2.6),
            work("futex", "system", 1.0, 5.0, 5.5),
            work("read", "disk", 1.0, 0.85, 1.0),
        ];
        let table = Table { means: table::means(&works), works, ..Table::default() };
        let missed = |whole| -> Vec<String> {
            let all = promises(&table, whole).into_iter();
            all.filter(|promise| !promise.kept).map(|promise| promise.what).collect()
        };
        let rows =
            ["QEMU/ours, pair", "QEMU/ours, xz", "ours/native, xz", "QEMU/ours, futex", "scaling, pair"];
        assert_eq!(missed(false), rows);
        assert_eq!(missed(true), [&["QEMU/ours, geomean"], &rows[..]].concat());
    }
}
