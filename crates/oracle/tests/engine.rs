//! The software engine against the host's processor: a fixed seed, at least half a million instructions.

use std::sync::Arc;

use wardian_cpu::CpuModel;
use wardian_engine_soft::SoftEngine;
use wardian_oracle::native::NativeError;
use wardian_oracle::session::Kind;
use wardian_oracle::{Setup, engine, open, options};
use wardian_time::{Nanos, TimeBase};

/// (bitness, kind, instructions).
const PLAN: [(u32, Kind, u64); 4] = [
    (64, Kind::Single, 300_000),
    (64, Kind::Sequence, 100_000),
    (32, Kind::Single, 100_000),
    (32, Kind::Sequence, 50_000),
];

#[test]
fn engine_leaves_what_the_host_leaves() {
    let time = TimeBase::manual(Nanos(0));
    // The processor that a guest gets on this host, AVX-512 included where the host has it.
    let model = Arc::new(CpuModel::host("host", &SoftEngine::offer(&time)).unwrap());
    let setup = |bitness| Setup { seed: 20_261_124, bitness, undefined: false };
    let subject = engine(&model).unwrap();
    let mut session = match open(&model, &setup(64), subject, |_| true) {
        Ok(session) => session,
        Err(error) => match error.downcast_ref::<NativeError>() {
            Some(NativeError::Host(why)) => {
                println!("skipped, because the host cannot be the oracle: {why}");
                return;
            }
            _ => panic!("{error}"),
        },
    };
    let mut end = 0;
    for (bitness, kind, count) in PLAN {
        let setup = setup(bitness);
        session.generate(setup.seed, options(&model, &setup, |_| true).unwrap());
        end += count;
        while session.tally.instructions < end {
            session.batch(kind).unwrap();
        }
    }
    let tally = &session.tally;
    println!("{} instructions in {} cases; by vector {:?}", tally.instructions, tally.cases, tally.faults);
    for (reason, count) in &tally.skipped {
        println!("excused {count}: {reason}");
    }
    assert!(tally.instructions >= 500_000);
    // The cases are worth something only if most run to their end and all kinds of exceptions occur.
    assert!(tally.faults[&3] * 10 > tally.cases * 7, "{:?}", tally.faults);
    for vector in [0, 6, 13, 14, 16, 19] {
        assert!(tally.faults.contains_key(&vector), "no case met exception {vector}");
    }
    let excused: u64 = tally.skipped.values().sum();
    assert!(excused * 50 < tally.cases, "{excused} of {} excused", tally.cases);
    let reports: Vec<_> = tally.failures.iter().map(|failure| failure.report.as_str()).collect();
    assert!(
        tally.failed.is_empty(),
        "{} encodings differ: {:?}\n{}",
        tally.failed.len(),
        tally.failed.keys().take(40).collect::<Vec<_>>(),
        reports.join("\n")
    );
}
