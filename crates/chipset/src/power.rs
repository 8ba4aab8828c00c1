//! What the guest asks of the machine as a whole.

/// A request of the guest to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off (ACPI S5).
    PowerOff,
    /// Reset (reset register, i8042 pulse, port CF9h).
    Reset,
    /// The test guest's debug-exit port was written with this code.
    DebugExit(u32),
}

/// Where such a request goes. Must not block.
pub trait PowerSink: Send + Sync {
    /// The guest asks for `request`.
    fn request(&self, request: PowerRequest);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{PowerRequest, PowerSink};
    use crate::wire::lock;
    use std::sync::Mutex;

    /// Remembers the requests.
    #[derive(Default)]
    pub(crate) struct Requests(Mutex<Vec<PowerRequest>>);

    impl Requests {
        pub(crate) fn take(&self) -> Vec<PowerRequest> {
            std::mem::take(&mut lock(&self.0))
        }
    }

    impl PowerSink for Requests {
        fn request(&self, request: PowerRequest) {
            lock(&self.0).push(request);
        }
    }
}
