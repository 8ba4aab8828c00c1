use super::{BEAT, Common, Patient, STRAY, Turn, beat, step};
use crate::accounts::Phase;
use crate::verdict::Verdict;
use wardian_time::{Nanos, host_ticks};

const S: u64 = 1_000_000_000;

#[test]
fn an_episode_is_told_once_and_its_end_once() {
    let (mut patient, window) = (Patient::default(), Nanos(20 * S));
    let mut told = Vec::new();
    let steal = || Some(Verdict::Steal);
    let spin = |low| Some(Verdict::Spin { low, high: low });
    let verdicts = [None, steal(), steal(), spin(1), spin(2), None, None, spin(1), None];
    for (second, verdict) in verdicts.into_iter().enumerate() {
        told.push(match patient.turn(verdict, Nanos((30 + second as u64) * S), window) {
            Turn::Nothing => 0,
            Turn::New(_) => 1,
            Turn::Over(after) => after.0 / S,
        });
    }
    // The same again, right after it was over, is not told anew; how long it was is.
    assert_eq!(told, [0, 1, 0, 1, 0, 22, 0, 0, 21]);
    let late = patient.turn(spin(1), Nanos(90 * S), window);
    assert!(matches!(late, Turn::New(Verdict::Spin { low: 1, .. })));
}

/// Of any twenty beats in a row, few come at the same moment of a guest's tick.
#[test]
fn beats_keep_step_with_no_tick() {
    for hz in [100, 250, 300, 1000] {
        let tick = S / hz;
        let mut at = 0;
        let phases: Vec<u64> = (0..200)
            .map(|count| {
                let span = beat(count).as_nanos() as u64;
                assert!((BEAT.as_nanos() as u64..=BEAT.as_nanos() as u64 + STRAY).contains(&span));
                at += span;
                at % tick
            })
            .collect();
        for twenty in phases.windows(20) {
            for tenth in 0..10 {
                let alike = twenty.iter().filter(|phase| **phase * 10 / tick == tenth).count();
                assert!(alike <= 7, "{hz} Hz: {alike} of 20 in part {tenth}");
            }
        }
    }
}

#[test]
fn guest_time_is_compared_only_while_it_runs() {
    let mut last = None;
    assert_eq!(step(&mut last, true, Nanos(5 * S), Nanos(S)), Nanos(0), "the first time");
    assert_eq!(step(&mut last, true, Nanos(6 * S), Nanos(S)), Nanos(0));
    assert_eq!(step(&mut last, true, Nanos(10 * S), Nanos(S)), Nanos(3 * S));
    assert_eq!(step(&mut last, true, Nanos(10 * S), Nanos(S)), Nanos(S), "it stood still");
    assert_eq!(step(&mut last, false, Nanos(10 * S), Nanos(S)), Nanos(0), "paused");
    assert_eq!(step(&mut last, true, Nanos(90 * S), Nanos(S)), Nanos(0), "after a pause");
}

#[test]
fn a_window_is_as_long_as_asked_for_and_no_longer_than_needed() {
    let (mut patient, window) = (Patient::default(), Nanos(3 * S));
    let slot = crate::tests::idle_slot();
    let mut common = Common::default();
    for second in 1..=10u64 {
        common.at = Nanos(second * S);
        common.beat.since = Nanos(S);
        patient.look(&slot, &common, window);
        assert_eq!(patient.window(window).is_some(), second >= 4, "{second}");
    }
    assert_eq!(patient.window(window).map(|w| (w.span_ns, w.looks)), Some((3 * S, 0)));
    // The process was stopped: one interval is longer than the window.
    common.at = Nanos(50 * S);
    common.stopped = Nanos(40 * S);
    patient.look(&slot, &common, window);
    let w = patient.window(window).expect("a window");
    assert_eq!((w.span_ns, w.stopped_ns), (40 * S, 40 * S));
}

#[test]
fn a_pause_excuses_late_timers_and_a_moved_clock() {
    let (mut patient, window) = (Patient::default(), Nanos(3 * S));
    let slot = crate::tests::idle_slot();
    slot.account.enter(Phase::Halted, host_ticks());
    let mut common = Common::default();
    let mut beat = |patient: &mut Patient, fault: bool| {
        common.at = Nanos(common.at.0 + S);
        common.beat.since = Nanos(S);
        common.timer_late = Nanos(if fault { 5 * S } else { 0 });
        common.clock_step = common.timer_late;
        patient.look(&slot, &common, window);
        patient.window(window).map(|w| (w.timer_late_ns, w.clock_step_ns))
    };
    for _ in 0..4 {
        beat(&mut patient, false);
    }
    slot.account.enter(Phase::Resting, host_ticks());
    std::thread::sleep(std::time::Duration::from_millis(1));
    slot.account.enter(Phase::Halted, host_ticks());
    assert_eq!(beat(&mut patient, true), Some((0, 0)));
    assert_eq!(beat(&mut patient, false), Some((0, 0)));
    assert_eq!(beat(&mut patient, true), Some((5 * S, 5 * S)));
}
