//! Spares a third party that does not answer, and those who would wait for it.

/// After so many failures in a row it is left alone.
const FAILURES: u32 = 5;
/// For so long, in milliseconds; then one request finds out whether it is back.
const REST: i64 = 30_000;

/// What is known of the third party's health. Times are Unix milliseconds: the process is frozen between two invocations, and no
/// document says that its monotonic clock goes on meanwhile.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    failures: u32,
    rests_until: i64,
}

impl CircuitBreaker {
    /// Whether a request may be made now. Whoever makes it says how it went, unless that is told neither way: then the next one may
    /// be made after another rest.
    pub(super) fn allows(&mut self, now: i64) -> bool {
        // A clock that has been set back makes no rest longer.
        let rests = (self.rests_until - REST..self.rests_until).contains(&now);
        if self.is_open() && rests {
            return false;
        }
        self.rests_until = now + REST;
        true
    }

    /// The third party has answered.
    pub(super) fn answered(&mut self) {
        self.failures = 0;
    }

    /// It has failed, or not answered in time.
    pub(super) fn failed(&mut self, now: i64) {
        self.failures = self.failures.saturating_add(1);
        self.rests_until = now + REST;
    }

    fn is_open(&self) -> bool {
        self.failures >= FAILURES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(now: i64) -> CircuitBreaker {
        let mut breaker = CircuitBreaker::default();
        (0..FAILURES).for_each(|_| breaker.failed(now));
        breaker
    }

    #[test]
    fn after_failures_in_a_row_it_rests_and_then_lets_one_request_through() {
        let mut breaker = CircuitBreaker::default();
        for _ in 1..FAILURES {
            breaker.failed(0);
            assert!(breaker.allows(0));
        }
        breaker.failed(0);
        assert!(!breaker.allows(0) && !breaker.allows(REST - 1));
        // One: its outcome is awaited, but not for ever.
        assert!(breaker.allows(REST) && !breaker.allows(REST) && !breaker.allows(2 * REST - 1));
        assert!(breaker.allows(2 * REST));
        breaker.failed(2 * REST + 5);
        assert!(!breaker.allows(3 * REST + 4) && breaker.allows(3 * REST + 5));
        breaker.answered();
        assert!(breaker.allows(3 * REST + 5) && breaker.allows(3 * REST + 5));
    }

    #[test]
    fn an_answer_between_two_failures_is_no_row() {
        let mut breaker = CircuitBreaker::default();
        for _ in 0..10 * FAILURES {
            breaker.failed(0);
            assert!(breaker.allows(0));
            breaker.answered();
        }
    }

    #[test]
    fn a_clock_that_was_set_back_makes_no_rest_longer() {
        let mut breaker = open(1_000_000);
        assert!(breaker.allows(0) && !breaker.allows(1) && breaker.allows(REST));
    }

    proptest! {
        /// However it goes: while requests fail there is one in each rest, and none is kept back for longer.
        #[test]
        fn one_that_stays_away_is_asked_once_in_a_rest(steps in prop::collection::vec(0..REST, 1..200)) {
            let (mut breaker, mut now, mut asked) = (open(0), 0, 0);
            for step in steps {
                now += step;
                let allowed = breaker.allows(now);
                prop_assert_eq!(allowed, now - asked >= REST);
                if allowed {
                    asked = now;
                    breaker.failed(now);
                }
            }
        }
    }
}
