//! The oracle's own test: the host agrees with itself, every encoding is made, and a changed outcome is noticed.

use std::sync::Arc;

use wardian_cpu::{CpuModel, Offer};
use wardian_oracle::case::{CODE, Case, Outcome, Scope, State, WINDOW, agree, differences};
use wardian_oracle::native::{NativeError, wide_layout};
use wardian_oracle::session::{Kind, Subject};
use wardian_oracle::{Setup, open, options};

#[test]
fn host_agrees_with_itself() {
    let model = Arc::new(
        CpuModel::host("host", &Offer { avx512: true, tsc_hz: 1_000_000_000, ..Offer::default() }).unwrap(),
    );
    let setup = |bitness| Setup { seed: 7, bitness, undefined: true };
    let mut session = match open(&model, &setup(64), Subject::Itself, |_| true) {
        Ok(session) => session,
        Err(error) => match error.downcast_ref::<NativeError>() {
            Some(NativeError::Host(why)) => {
                println!("skipped, because the host cannot be the oracle: {why}");
                return;
            }
            _ => panic!("{error}"),
        },
    };
    session.count_codes = true;
    for bitness in [64, 32] {
        let options = options(&model, &setup(bitness), |_| true).unwrap();
        let codes = options.codes.clone();
        session.generate(7, options);
        for _ in 0..1 + 4 * codes.len() / 127 {
            session.batch(Kind::Single).unwrap();
        }
        session.batch(Kind::Sequence).unwrap();
        let seen = |code: &String| {
            session.tally.codes.contains_key(code) || session.tally.codes.contains_key(&format!("{code} #UD"))
        };
        let never: Vec<_> = codes.iter().map(|code| format!("{code:?}")).filter(|code| !seen(code)).collect();
        assert!(never.is_empty(), "never made: {never:?}");
    }
    assert!(session.tally.failed.is_empty(), "{:?}", session.tally.failures);
}

#[test]
fn a_difference_is_noticed() {
    let case = Case {
        bitness: 64,
        address: CODE,
        code: vec![0x90],
        jumps: false,
        state: State::new(),
        patches: Vec::new(),
        undefined: 1,
        x87: false,
    };
    let scope = Scope { xcr0: 7, wide: wide_layout(), undefined: false };
    let good = Outcome {
        fault: wardian_oracle::case::Fault { vector: 3, error: 0, address: 0 },
        rip: CODE + 2,
        state: State::new(),
        window: vec![0; WINDOW],
    };
    assert!(agree(&case, &good, &good, &scope));
    assert!(differences(&case, &good, &good, &scope).is_empty());
    type Change = (&'static str, fn(&mut Outcome));
    let changes: [Change; 9] = [
        ("fault", |outcome| outcome.fault.error = 4),
        ("rip", |outcome| outcome.rip += 1),
        ("r13", |outcome| outcome.state.gpr[13] = 1 << 63),
        ("rflags", |outcome| outcome.state.rflags ^= 0x40),
        ("fs_base", |outcome| outcome.state.fs = 8),
        ("st7", |outcome| outcome.state.xsave[32 + 7 * 16 + 9] = 1),
        ("xmm15", |outcome| outcome.state.xsave[160 + 255] = 1),
        ("ymmh15", |outcome| outcome.state.xsave[831] = 1),
        ("0x20003ff8", |outcome| outcome.window[WINDOW - 1] = 1),
    ];
    for (name, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(!agree(&case, &good, &bad, &scope), "{name}");
        let lines = differences(&case, &good, &bad, &scope);
        assert!(lines.len() == 1 && lines[0].contains(name), "{name}: {lines:?}");
    }
    // A flag that the manual leaves undefined is not compared unless that is asked for.
    let mut carry = good.clone();
    carry.state.rflags ^= 1;
    assert!(agree(&case, &good, &carry, &scope));
    assert!(!agree(&case, &good, &carry, &Scope { undefined: true, ..scope }));
}
