//! One row of the table for each cause (time.md 2.7).

use super::{Sighting, Verdict, Window, explain, is_loud, judge};

const S: u64 = 1_000_000_000;

/// A vCPU that spins for 20 s: what most rows differ from in one thing.
fn busy() -> Window {
    Window {
        span_ns: 20 * S,
        guest_ns: 20 * S,
        ran_ns: Some(19_900_000_000),
        delayed_ns: 100_000_000,
        interrupts: 5000,
        looks: 20,
        sightings: vec![seen(0xffff_ffff_8100_0010, true); 20],
        ..Window::default()
    }
}

fn seen(rip: u64, interrupts_enabled: bool) -> Sighting {
    Sighting { rip, user: false, interrupts_enabled, interrupt_pending: !interrupts_enabled }
}

fn masked() -> Window {
    Window {
        masked_ns: 19 * S,
        interrupts: 0,
        sightings: vec![seen(0xffff_ffff_8100_0010, false); 20],
        ..busy()
    }
}

const AT: u64 = 0xffff_ffff_8100_0010;

#[test]
fn every_row_of_the_table() {
    let idle = Window { guest_ns: S, halted_ns: 19 * S, ran_ns: Some(S), looks: 2, ..busy() };
    let spin = Some(Verdict::Spin { low: AT, high: AT });
    let masked_spin = Some(Verdict::MaskedSpin { low: AT, high: AT });
    let table: [(&str, Window, Option<Verdict>); 29] = [
        (
            "paused",
            Window { guest_ns: 0, resting_ns: 20 * S, ran_ns: Some(0), ..busy() },
            Some(Verdict::Paused),
        ),
        (
            "a pause within",
            Window { guest_ns: 15 * S, resting_ns: 5 * S, ran_ns: Some(15 * S), ..busy() },
            None,
        ),
        (
            "a short pause",
            Window { guest_ns: 19 * S, resting_ns: S, ran_ns: Some(19 * S), ..busy() },
            spin.clone(),
        ),
        ("stopped", Window { stopped_ns: 19 * S, ran_ns: Some(S), ..busy() }, Some(Verdict::Stopped)),
        ("stopped and then slow", Window { stopped_ns: 5 * S, ran_ns: Some(S), ..busy() }, None),
        ("not run", Window { ran_ns: Some(S / 10), delayed_ns: 19 * S, ..busy() }, Some(Verdict::Steal)),
        (
            "run too little",
            Window { ran_ns: Some(9 * S), delayed_ns: 11 * S, ..busy() },
            Some(Verdict::Steal),
        ),
        ("run enough", Window { ran_ns: Some(11 * S), delayed_ns: 9 * S, ..busy() }, spin.clone()),
        ("swapped out", Window { ran_ns: Some(S), delayed_ns: 2 * S, ..busy() }, Some(Verdict::Held)),
        ("no accounts", Window { ran_ns: None, delayed_ns: 0, ..busy() }, spin.clone()),
        ("idle", idle.clone(), None),
        ("not woken", Window { unwoken_ns: 2 * S, ..idle.clone() }, Some(Verdict::LostWakeup)),
        ("not woken on a busy host", Window { unwoken_ns: 2 * S, doctor_late_ns: S, ..idle.clone() }, None),
        ("late timers", Window { timer_late_ns: 3 * S / 2, ..idle.clone() }, Some(Verdict::LateTimers)),
        (
            "late timers of a busy host",
            Window { timer_late_ns: 3 * S / 2, doctor_late_ns: S, ..idle.clone() },
            None,
        ),
        ("timers a little late", Window { timer_late_ns: S / 2, ..idle.clone() }, None),
        (
            "a long exit",
            Window { guest_ns: 5 * S, exits_ns: 15 * S, longest_exit_ns: 15 * S, looks: 5, ..busy() },
            Some(Verdict::LongExit),
        ),
        (
            "a long exit that the host did not run",
            Window {
                guest_ns: 8 * S,
                exits_ns: 12 * S,
                longest_exit_ns: 11 * S,
                ran_ns: Some(11 * S),
                delayed_ns: 9 * S,
                looks: 5,
                ..busy()
            },
            None,
        ),
        ("not woken while starved", Window { unwoken_ns: 2 * S, delayed_ns: 3 * S, ..idle.clone() }, None),
        (
            "late timers while starved",
            Window { timer_late_ns: 2 * S, delayed_ns: 3 * S, ..idle.clone() },
            None,
        ),
        (
            "many short exits",
            Window { guest_ns: 5 * S, exits_ns: 15 * S, longest_exit_ns: S, ..busy() },
            None,
        ),
        ("interrupts on", busy(), spin.clone()),
        ("interrupts off", masked(), masked_spin.clone()),
        ("nothing pending", Window { masked_ns: 0, ..masked() }, None),
        ("no interrupts at all", Window { interrupts: 0, ..busy() }, None),
        (
            "a lock holder",
            Window { starved_sibling: Some((3, 15 * S)), ..busy() },
            Some(Verdict::LockHolder { vcpu: 3 }),
        ),
        ("deaf", Window { sightings: Vec::new(), ..busy() }, Some(Verdict::Engine)),
        ("clock", Window { clock_step_ns: 3 * S, ..busy() }, Some(Verdict::ClockStep)),
        ("clock after a pause", Window { clock_step_ns: 3 * S, resting_ns: 5 * S, ..busy() }, None),
    ];
    for (what, window, want) in table {
        assert_eq!(judge(&window), want, "{what}");
    }
}

#[test]
fn work_is_no_spin() {
    let mut user = busy();
    user.sightings[7].user = true;
    assert_eq!(judge(&user), None, "user mode is seen");
    let mut wide = busy();
    for (n, seen) in wide.sightings.iter_mut().enumerate() {
        seen.rip += n as u64 * 0x1_0000;
    }
    assert_eq!(judge(&wide), None, "all over the kernel");
    let mut mixed = busy();
    for seen in mixed.sightings.iter_mut().step_by(2) {
        seen.interrupts_enabled = false;
    }
    assert_eq!(judge(&mixed), None, "interrupts now on, now off");
    let mut few = busy();
    few.sightings.truncate(5);
    assert_eq!(judge(&few), None, "hardly looked at");
    // Some looks find the handler of an interrupt.
    let mut handler = busy();
    for seen in &mut handler.sightings[..4] {
        *seen = self::seen(0xffff_ffff_8200_0000, false);
    }
    handler.sightings[10].rip = AT + 12;
    assert_eq!(judge(&handler), Some(Verdict::Spin { low: AT, high: AT + 12 }));
    // A host that runs the vCPU half of the time does not hide a spin.
    let half = Window { ran_ns: Some(12 * S), delayed_ns: 8 * S, masked_ns: 11 * S, ..masked() };
    assert_eq!(judge(&half), Some(Verdict::MaskedSpin { low: AT, high: AT }));
}

#[test]
fn the_lines_say_whose_doing_it_is() {
    let steal = Window { span_ns: 21_300_000_000, ran_ns: Some(0), delayed_ns: 20_900_000_000, ..busy() };
    let steal = Window { guest_ns: steal.span_ns, ..steal };
    assert_eq!(
        explain(1, &Verdict::Steal, &steal),
        "vCPU 1 made no progress for 21.3 s: the host did not run it (steal 20.9 s)"
    );
    assert!(is_loud(&Verdict::Steal, &steal) && !is_loud(&Verdict::Paused, &steal));
    let slow = Window { ran_ns: Some(5 * S), delayed_ns: 15 * S, ..busy() };
    assert_eq!(
        explain(0, &Verdict::Steal, &slow),
        "vCPU 0 got 25 % of a processor for 20.0 s: the host did not run it (steal 15.0 s)"
    );
    assert!(!is_loud(&Verdict::Steal, &slow), "a slow host is no lockup");
    let masked = masked();
    let line = explain(0, &judge(&masked).unwrap(), &masked);
    assert!(
        line.contains("kernel code at 0xffffffff81000010 with interrupts off (one waits since 19.0 s)"),
        "{line}"
    );
    assert!(is_loud(&judge(&masked).unwrap(), &masked));
}
