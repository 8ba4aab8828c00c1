//! `cargo xtask lab accounts`: what the lockup doctor and its accounts of each vCPU cost.
//!
//! A guest that does a fixed job under a timer of 1000 Hz runs with them and without, in turn, alone on one core;
//! passes of the job for the CPU time of the whole process are compared.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::cell::{Activity, Cell, Device, Guest, Load, Policy};
use super::guest::Guests;
use super::run::{self, Place};
use crate::run::{Step, repository};

/// Most that they may cost, as a part of the passes.
const MOST: f64 = 0.01;

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of runs.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..=100))]
    pairs: u64,
    /// Length of each run.
    #[arg(long, value_name = "S", default_value_t = 6, value_parser = clap::value_parser!(u64).range(3..=600))]
    seconds: u64,
    /// Fail if they cost more than 1 %.
    #[arg(long)]
    check: bool,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
}

pub fn main(args: &Args) -> Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let place =
        Place::new(&target.map_or_else(|| repository().join("target"), PathBuf::from).join("lab/accounts"))?;
    let guests = |seconds: &str| {
        let more = ["--lockup-seconds".to_owned(), seconds.to_owned()];
        Guests::prepare(args.wardian.as_deref(), &more, false, &place.guests())
    };
    let sides = [("without", guests("0")?), ("with", guests("20")?)];
    let mut rates = [Vec::new(), Vec::new()];
    for seed in 1..=args.pairs {
        // Each goes first as often as the other.
        let order = if seed % 2 == 0 { [0, 1] } else { [1, 0] };
        for side in order {
            let (name, guests) = &sides[side];
            let cell = Cell {
                load: Load::None,
                guest: Guest::Count,
                device: Device::Pit,
                policy: Policy::LateOne,
                activity: Activity::Job,
                hz: 1000,
                seconds: args.seconds,
                seed,
            };
            let step = Step::begin(format!("{seed} of {}, {name} accounts", args.pairs));
            let outcomes = run::batch(guests, &place, &[cell], 1);
            step.end();
            let Some(outcome) = outcomes?.into_iter().next() else { bail!("The lab measured nothing") };
            if !outcome.faults.is_empty() {
                bail!("The guest did not run as it should: {}", outcome.faults.join("; "));
            }
            let Some(rate) = outcome.passes_per_cpu_minute() else {
                bail!("The guest did no pass of its job")
            };
            rates[side].push(rate);
        }
    }
    let ratios: Vec<f64> = rates[1].iter().zip(&rates[0]).map(|(with, without)| with / without).collect();
    let [without, with] = rates.map(median);
    let cost = 1.0 - median(ratios.clone());
    println!("Passes of the job in a minute of CPU time, medians of {}:", args.pairs);
    println!("  without accounts {without:>10.0}");
    println!("  with             {with:>10.0}");
    println!("They cost {:.2} % (the median pair; pairs: {})", cost * 100.0, told(&ratios));
    if args.check && cost > MOST {
        bail!("The accounts cost {:.2} %, and may cost {:.0} %", cost * 100.0, MOST * 100.0);
    }
    Ok(())
}

fn told(ratios: &[f64]) -> String {
    let each: Vec<String> = ratios.iter().map(|ratio| format!("{:+.2}", (1.0 - ratio) * 100.0)).collect();
    each.join(" ")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_one() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(told(&[0.995, 1.002]), "+0.50 -0.20");
        assert!(median(Vec::new()).is_nan());
    }
}
