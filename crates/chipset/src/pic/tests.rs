use std::sync::atomic::Ordering;

use super::{Pic, Port};
use wardian_irq::Delivery;

const CMD: [Port; 2] = [Port::Command { master: true }, Port::Command { master: false }];
const DATA: [Port; 2] = [Port::Data { master: true }, Port::Data { master: false }];

/// As Linux' `init_8259A`: vectors 30h-3Fh, cascade on 2, 8086 mode, normal or automatic EOI.
fn linux(auto_eoi: bool) -> Pic {
    let pic = Pic::new();
    pic.write(DATA[0], 0xff);
    pic.write(CMD[0], 0x11);
    pic.write(DATA[0], 0x30);
    pic.write(DATA[0], 1 << 2);
    pic.write(DATA[0], if auto_eoi { 3 } else { 1 });
    pic.write(CMD[1], 0x11);
    pic.write(DATA[1], 0x38);
    pic.write(DATA[1], 2);
    pic.write(DATA[1], 1);
    pic.write(DATA[0], 0);
    pic.write(DATA[1], 0);
    pic
}

fn pulse(pic: &Pic, irq: u8) {
    pic.set_line(irq, true);
    pic.set_line(irq, false);
}

fn asks(pic: &Pic) -> bool {
    pic.output().load(Ordering::Acquire)
}

/// Specific EOI as Linux sends it.
fn eoi(pic: &Pic, irq: u8) {
    if irq >= 8 {
        pic.write(CMD[1], 0x60 | (irq - 8));
        pic.write(CMD[0], 0x62);
    } else {
        pic.write(CMD[0], 0x60 | irq);
    }
}

#[test]
fn linux_finds_it_and_gets_its_vectors() {
    let pic = Pic::new();
    // probe_8259A: the mask register of the master keeps what is written.
    pic.write(DATA[1], 0xff);
    pic.write(DATA[0], 0xfb);
    assert_eq!(pic.read(DATA[0]), 0xfb);
    let pic = linux(false);
    for irq in [0, 1, 3, 7, 8, 12, 15] {
        assert_eq!(pic.set_line(irq, true), Delivery::Accepted, "{irq}");
        assert!(asks(&pic));
        assert_eq!(pic.acknowledge(), 0x30 + irq);
        assert!(!asks(&pic));
        pic.set_line(irq, false);
        eoi(&pic, irq);
        assert!(!asks(&pic));
    }
}

#[test]
fn a_masked_request_waits() {
    let pic = linux(false);
    pic.write(DATA[0], 0x10);
    assert_eq!(pic.set_line(4, true), Delivery::Masked);
    assert!(!asks(&pic));
    assert_eq!(pic.read(CMD[0]) & 0x10, 0x10);
    pic.write(DATA[0], 0);
    assert!(asks(&pic));
}

#[test]
fn higher_priority_nests_and_lower_waits() {
    let pic = linux(false);
    pulse(&pic, 4);
    assert_eq!(pic.acknowledge(), 0x34);
    pulse(&pic, 5);
    assert!(!asks(&pic));
    pulse(&pic, 10); // by the cascade, above 4
    assert_eq!(pic.acknowledge(), 0x3a);
    pulse(&pic, 9); // above 10 at the slave, but the master's input 2 is in service
    assert!(!asks(&pic));
    pic.write(CMD[0], 0x0b);
    assert_eq!(pic.read(CMD[0]), 0x14);
    eoi(&pic, 10);
    assert_eq!(pic.acknowledge(), 0x39);
    eoi(&pic, 9);
    pic.write(CMD[0], 0x20); // non-specific: ends 4
    assert_eq!(pic.acknowledge(), 0x35);
}

#[test]
fn a_request_that_goes_away_is_spurious() {
    let pic = linux(false);
    assert_eq!(pic.acknowledge(), 0x37);
    pic.write(CMD[0], 0x0b);
    assert_eq!(pic.read(CMD[0]), 0, "no in-service bit");
    pic.set_line(11, true);
    pic.write(DATA[1], 0xff); // masked between request and acknowledge
    assert_eq!(pic.acknowledge(), 0x3f);
    pic.write(CMD[1], 0x0b);
    assert_eq!(pic.read(CMD[1]), 0);
    assert_eq!(pic.read(CMD[0]), 4, "the master took the cascade");
}

#[test]
fn level_inputs_follow_their_line() {
    let pic = linux(false);
    pic.write(Port::Elcr { master: true }, 0xff);
    pic.write(Port::Elcr { master: false }, 0x08);
    assert_eq!(pic.read(Port::Elcr { master: true }), 0xf8);
    pic.set_line(11, true);
    assert_eq!(pic.acknowledge(), 0x3b);
    eoi(&pic, 11);
    assert!(asks(&pic), "still asserted");
    assert_eq!(pic.acknowledge(), 0x3b);
    pic.set_line(11, false);
    eoi(&pic, 11);
    assert!(!asks(&pic));
}

#[test]
fn automatic_eoi_leaves_nothing_in_service() {
    let pic = linux(true);
    pulse(&pic, 3);
    pulse(&pic, 4);
    assert_eq!(pic.acknowledge(), 0x33);
    assert_eq!(pic.acknowledge(), 0x34);
    pic.write(CMD[0], 0x80); // rotate in automatic EOI mode
    pulse(&pic, 4);
    assert_eq!(pic.acknowledge(), 0x34);
    pulse(&pic, 4);
    pulse(&pic, 5);
    assert_eq!(pic.acknowledge(), 0x35, "4 is the lowest now");
    assert_eq!(pic.acknowledge(), 0x34);
}

#[test]
fn rotation_and_set_priority() {
    let pic = linux(false);
    pulse(&pic, 3);
    assert_eq!(pic.acknowledge(), 0x33);
    pic.write(CMD[0], 0xa0); // rotate on non-specific EOI
    pulse(&pic, 3);
    pulse(&pic, 6);
    assert_eq!(pic.acknowledge(), 0x36);
    pic.write(CMD[0], 0xe0 | 6);
    assert_eq!(pic.acknowledge(), 0x33);
    eoi(&pic, 3);
    pic.write(CMD[0], 0xc0 | 7); // 7 lowest, 0 highest
    pulse(&pic, 0);
    pulse(&pic, 7);
    assert_eq!(pic.acknowledge(), 0x30);
}

#[test]
fn special_mask_mode_lets_lower_priorities_through() {
    let pic = linux(false);
    pulse(&pic, 1);
    assert_eq!(pic.acknowledge(), 0x31);
    pulse(&pic, 5);
    assert!(!asks(&pic));
    pic.write(DATA[0], 2);
    pic.write(CMD[0], 0x68);
    assert_eq!(pic.acknowledge(), 0x35);
    pic.write(CMD[0], 0x20);
    pic.write(CMD[0], 0x0b);
    assert_eq!(pic.read(CMD[0]), 2, "the masked level is not what a non-specific EOI ends");
}

#[test]
fn polling_takes_the_request() {
    let pic = linux(false);
    pic.write(CMD[0], 0x0c);
    assert_eq!(pic.read(CMD[0]), 0);
    pulse(&pic, 6);
    pic.write(CMD[0], 0x0c);
    assert_eq!(pic.read(CMD[0]), 0x86);
    assert!(!asks(&pic));
    eoi(&pic, 6);
    pulse(&pic, 9);
    pulse(&pic, 10);
    pic.write(CMD[1], 0x0c);
    assert_eq!(pic.read(CMD[1]), 0x81);
    assert_eq!(pic.read(CMD[1]), 4, "one poll only, then the request register");
}

#[test]
fn initialisation_keeps_a_request_of_the_slave_and_of_level_inputs() {
    let pic = linux(false);
    pic.write(Port::Elcr { master: true }, 0x20);
    pic.set_line(5, true);
    pic.set_line(6, true);
    pic.set_line(8, true);
    pic.write(CMD[0], 0x11);
    for byte in [0x40, 4, 1] {
        pic.write(DATA[0], byte);
    }
    assert_eq!(pic.acknowledge(), 0x38);
    eoi(&pic, 8);
    assert_eq!(pic.acknowledge(), 0x45);
    pic.set_line(5, false);
    eoi(&pic, 5);
    assert!(!asks(&pic), "6 needs a new edge");
}
