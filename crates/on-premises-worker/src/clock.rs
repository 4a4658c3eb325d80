//! A clock that goes on while the machine is suspended.

use std::time::{Duration, Instant, SystemTime};

/// Less than this is how far two clocks that are read one after the other may be apart.
const NOISE: Duration = Duration::from_millis(100);

/// The monotonic clock, which stands still while the machine is suspended or its virtual machine is paused, put forward by what
/// the wall clock has gained on it since it was read last. A wall clock that is set back changes nothing; one that is set
/// forward ends a lease early, and then the job is claimed again.
#[derive(Debug)]
pub(crate) struct Clock {
    read_last: (Instant, SystemTime),
    ahead: Duration,
}

impl Clock {
    /// A clock that shows that time now.
    pub(crate) fn new(monotonic: Instant, wall: SystemTime) -> Self {
        Self { read_last: (monotonic, wall), ahead: Duration::ZERO }
    }

    /// The time.
    pub(crate) fn now(&mut self, monotonic: Instant, wall: SystemTime) -> Instant {
        let (last_monotonic, last_wall) = self.read_last;
        // None if the wall clock was set back.
        let wall_passed = wall.duration_since(last_wall).unwrap_or_default();
        let suspended = wall_passed.saturating_sub(monotonic.saturating_duration_since(last_monotonic));
        if suspended > NOISE {
            tracing::warn!(seconds = suspended.as_secs_f64(), "the machine was suspended, or its clock was set");
            self.ahead += suspended;
        }
        self.read_last = (monotonic, wall);
        monotonic + self.ahead
    }

    /// When that time comes by the monotonic clock, which timers go by.
    pub(crate) fn timer(&self, at: Instant) -> Instant {
        // What lies before the machine's start is long past.
        at.checked_sub(self.ahead).unwrap_or(self.read_last.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn time_goes_on_while_the_machine_is_suspended() {
        let (monotonic, wall) = (Instant::now(), SystemTime::now());
        let mut clock = Clock::new(monotonic, wall);
        assert_eq!(clock.now(monotonic + SECOND, wall + SECOND), monotonic + SECOND);
        // A minute asleep.
        assert_eq!(clock.now(monotonic + 2 * SECOND, wall + 62 * SECOND), monotonic + 62 * SECOND);
        assert_eq!(clock.timer(monotonic + 70 * SECOND), monotonic + 10 * SECOND);
        // And another one, after the clock was set back by an hour.
        let wall = wall + 63 * SECOND - 3600 * SECOND;
        assert_eq!(clock.now(monotonic + 3 * SECOND, wall), monotonic + 63 * SECOND);
        assert_eq!(clock.now(monotonic + 4 * SECOND, wall + 61 * SECOND), monotonic + 124 * SECOND);
    }

    #[test]
    fn clocks_that_are_read_one_after_the_other_do_not_add_up() {
        let (monotonic, wall) = (Instant::now(), SystemTime::now());
        let mut clock = Clock::new(monotonic, wall);
        for number in 1..=1000 {
            let noise = Duration::from_millis(number % 50);
            clock.now(
                monotonic + SECOND * u32::try_from(number).unwrap(),
                wall + SECOND * u32::try_from(number).unwrap() + noise,
            );
        }
        assert_eq!(clock.timer(monotonic), monotonic);
    }
}
