//! What the engine counted in one step: a run with the step less a run without, by `--stats-json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Counts by name: the engine's own, and the exits of a kind as `exit KIND`.
pub type Counters = BTreeMap<String, u64>;

/// What all vCPUs counted together, out of the file.
///
/// # Errors
/// When it is not there or not JSON.
pub fn read(file: &Path) -> Result<Counters> {
    let text = fs::read_to_string(file).with_context(|| format!("Cannot read {}", file.display()))?;
    Ok(sum(&serde_json::from_str(&text)?))
}

fn sum(stats: &Value) -> Counters {
    let mut all = Counters::new();
    let mut add = |name: String, value: &Value| *all.entry(name).or_default() += value.as_u64().unwrap_or(0);
    for vcpu in stats["vcpus"].as_array().into_iter().flatten() {
        for (name, value) in vcpu["engine"].as_object().into_iter().flatten() {
            add(name.clone(), value);
        }
        for exit in vcpu["exits"].as_array().into_iter().flatten() {
            add(format!("exit {}", exit["kind"].as_str().unwrap_or("?")), &exit["count"]);
        }
    }
    all
}

/// What is in `with` beyond `without`.
pub fn beyond(with: &Counters, without: &Counters) -> Counters {
    let less = |name: &String| without.get(name).copied().unwrap_or(0);
    with.iter().map(|(name, count)| (name.clone(), count.saturating_sub(less(name)))).collect()
}

/// A count in few letters.
pub fn short(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..10_000_000 => format!("{}k", count / 1000),
        _ => format!("{}M", count / 1_000_000),
    }
}

/// The two most frequent kinds of exit, in words.
pub fn exits(counters: &Counters) -> String {
    let mut kinds: Vec<(&str, u64)> = counters
        .iter()
        .filter_map(|(name, count)| Some((name.strip_prefix("exit ")?, *count)))
        .filter(|(_, count)| *count > 0)
        .collect();
    kinds.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let told: Vec<String> =
        kinds.iter().take(2).map(|(kind, count)| format!("{kind} {}", short(*count))).collect();
    told.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn counters_of_a_step() {
        let stats = |n: u64| {
            sum(&json!({"vcpus": [
                {"engine": {"tlb_misses": n, "lookups": 5}, "exits": [{"kind": "halt", "count": 2 * n}]},
                {"engine": {"tlb_misses": 1}, "exits": [{"kind": "port", "count": 30_000}]},
            ]}))
        };
        assert_eq!(stats(7)["tlb_misses"], 8);
        let step = beyond(&stats(20_000), &stats(0));
        assert_eq!([step["tlb_misses"], step["lookups"], step["exit halt"]], [20_000, 0, 40_000]);
        assert_eq!(exits(&stats(20_000)), "halt 40k, port 30k");
        assert_eq!(exits(&sum(&json!({}))), "");
    }
}
