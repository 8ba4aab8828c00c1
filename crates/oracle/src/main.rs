//! `wardian-oracle`: differential instruction tests by hand, for bring-up.

use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use wardian_cpu::{CpuModel, Offer};
use wardian_oracle::session::{Kind, Subject};
use wardian_oracle::{Setup, open};

/// Runs random instructions on the host and in the engine and compares what they leave.
#[derive(Parser)]
struct Arguments {
    /// Seed of the first round.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instructions to run.
    #[arg(long, default_value_t = 100_000)]
    count: u64,
    /// Only encodings whose name contains this (as iced-x86 spells it, such as Add_rm64_r64); may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// Leave out encodings whose name contains this; may be repeated.
    #[arg(long)]
    skip: Vec<String>,
    /// Sequences instead of single instructions.
    #[arg(long)]
    sequences: bool,
    /// Compare the host with itself.
    #[arg(long)]
    itself: bool,
    /// Compare undefined flags, too.
    #[arg(long)]
    undefined: bool,
    /// 64 or 32.
    #[arg(long, default_value_t = 64)]
    bitness: u32,
    /// Processor model.
    #[arg(long, default_value = "host")]
    cpu: String,
    /// AVX-512 state, too.
    #[arg(long)]
    avx512: bool,
    /// Reports to print.
    #[arg(long, default_value_t = 5)]
    keep: usize,
    /// Print how often each encoding ran.
    #[arg(long)]
    codes: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    let offer = Offer { avx512: arguments.avx512, tsc_hz: 1_000_000_000, ..Offer::default() };
    let model = Arc::new(CpuModel::host(&arguments.cpu, &offer)?);
    let setup = Setup { seed: arguments.seed, bitness: arguments.bitness, undefined: arguments.undefined };
    let keep = |name: &str| {
        (arguments.only.is_empty() || arguments.only.iter().any(|part| name.contains(part.as_str())))
            && !arguments.skip.iter().any(|part| name.contains(part.as_str()))
    };
    let subject = if arguments.itself { Subject::Itself } else { wardian_oracle::engine(&model)? };
    let mut session = open(&model, &setup, subject, keep)?;
    session.keep = arguments.keep;
    session.count_codes = arguments.codes;
    let kind = if arguments.sequences { Kind::Sequence } else { Kind::Single };
    let start = Instant::now();
    while session.tally.instructions < arguments.count {
        session.batch(kind)?;
    }
    let tally = &session.tally;
    for failure in &tally.failures {
        println!("{}\n{}", failure.codes, failure.report);
    }
    if arguments.codes {
        for (code, count) in &tally.codes {
            println!("{count:>8} {code}");
        }
        let all = wardian_oracle::options(&model, &setup, keep)?.codes;
        for code in all.iter().map(|code| format!("{code:?}")).filter(|code| !tally.codes.contains_key(code))
        {
            println!("   never {code}");
        }
    }
    println!("{} cases, {} instructions in {:?}", tally.cases, tally.instructions, start.elapsed());
    println!("by vector: {:?}  skipped: {:?}", tally.faults, tally.skipped);
    println!("counters: {:?}", session.counters());
    let mut failed: Vec<_> = tally.failed.iter().collect();
    failed.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    println!("{} failing encodings, {} failures", failed.len(), failed.iter().map(|(_, n)| **n).sum::<u64>());
    for (code, count) in failed.iter().take(60) {
        println!("{count:>8} {code}");
    }
    std::process::exit(i32::from(!failed.is_empty()));
}
