use std::sync::{Arc, Mutex};

use crate::{CodeListener, Gpa, GuestMemory, HIGH_RAM_START, LOW_RAM_END};

#[test]
fn access_outside_ram_is_an_error() {
    let mem = GuestMemory::new(0x10000).unwrap();
    mem.write(Gpa(0xfff8), &[1; 8]).unwrap();
    assert!(mem.write(Gpa(0xfff9), &[1; 8]).is_err());
    assert!(mem.read(Gpa(u64::MAX), &mut [0; 4]).is_err());
    assert!(GuestMemory::new(0).is_err());
    assert!(GuestMemory::new(4097).is_err());
}

#[test]
fn ram_above_the_hole_starts_at_four_gib() {
    let mem = GuestMemory::new(LOW_RAM_END + 0x2000).unwrap();
    mem.write(Gpa(HIGH_RAM_START + 0x1ff8), &[7; 8]).unwrap();
    assert!(mem.page(Gpa(LOW_RAM_END)).is_none());
    let (page, _) = mem.page(Gpa(HIGH_RAM_START + 0x1000)).unwrap();
    assert_eq!(page as u64, (LOW_RAM_END + 0x1000) / 4096);
}

#[derive(Default)]
struct Seen(Mutex<Vec<(usize, u64)>>);
impl CodeListener for Seen {
    fn code_written(&self, page: usize, granules: u64) {
        self.0.lock().unwrap().push((page, granules));
    }
}

#[test]
fn a_write_to_marked_code_is_told_once() {
    let mem = GuestMemory::new(0x10000).unwrap();
    let seen = Arc::new(Seen::default());
    assert!(mem.set_code_listener(Arc::clone(&seen) as Arc<dyn CodeListener>));
    mem.mark_code(3, 0x40..0x90);
    mem.write(Gpa(0x3000), &[0; 0x40]).unwrap();
    mem.write(Gpa(0x2ffc), &[0; 0x48]).unwrap();
    mem.write(Gpa(0x2ffc), &[0; 0x48]).unwrap();
    mem.stored(Gpa(0x3080), 8);
    assert_eq!(*seen.0.lock().unwrap(), vec![(3, 0b10), (3, 0b100)]);
    assert_eq!(mem.code_marks(3), 0);
}

#[test]
fn used_pages_are_those_that_were_written() {
    let mem = GuestMemory::new(LOW_RAM_END + 0x10_0000).unwrap();
    assert_eq!(mem.used_pages().unwrap(), []);
    mem.write(Gpa(0x5000), &[1]).unwrap();
    mem.write(Gpa(HIGH_RAM_START + 0x3000), &[1]).unwrap();
    let pages: Vec<u64> = mem.used_pages().unwrap().into_iter().flatten().collect();
    let high = LOW_RAM_END / 4096 + 3;
    // The host may give more than a page at once.
    assert!(pages.contains(&5) && pages.contains(&high) && pages.len() < 2000, "{pages:?}");
    assert_eq!(mem.page_address(high), Some(Gpa(HIGH_RAM_START + 0x3000)));
    assert_eq!(mem.page_address(5), Some(Gpa(0x5000)));
    assert_eq!(mem.page_address(high + 0x100), None);
    assert_eq!(mem.page_address(u64::MAX), None);
}

#[test]
fn an_image_is_read_and_never_written() {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    let source = GuestMemory::new(0x4000).unwrap();
    let mut image = source.file().try_clone().unwrap();
    image.write_all(&[7; 0x1000]).unwrap();
    let mem = GuestMemory::of_image(0x4000, source.file().try_clone().unwrap()).unwrap();
    mem.write(Gpa(0x10), &[9]).unwrap();
    let mut bytes = [0; 2];
    mem.read(Gpa(0x10), &mut bytes).unwrap();
    assert_eq!(bytes, [9, 7]);
    image.read_exact_at(&mut bytes, 0x10).unwrap();
    assert_eq!(bytes, [7, 7]);
    assert_eq!(mem.used_pages().unwrap().into_iter().flatten().count(), 4);
    assert!(GuestMemory::of_image(0x5000, image).is_err());
}
