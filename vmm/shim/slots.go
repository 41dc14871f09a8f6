package shim

// Slots of PCI devices. Cloud Hypervisor has 32 per segment; on segment 0 the
// base devices leave 29 for file shares (measured), each disk takes one more,
// and the other segments get as many so that any VMM has room to spare.
const (
	slotsPerSegment = 29
	maxSegments     = 8
)

// slots counts what is free on each segment. The holder serialises its use.
type slots struct{ free []int }

func newSlots(segments, disks int) *slots {
	s := &slots{free: make([]int, segments)}
	for i := range s.free {
		s.free[i] = slotsPerSegment
	}
	s.free[0] = max(0, slotsPerSegment-disks)
	return s
}

// take reserves a slot and tells its segment. Segment 0 comes last, since
// other kinds of device may want it.
func (s *slots) take() (segment int, ok bool) {
	for i := len(s.free) - 1; i >= 0; i-- {
		if s.free[i] > 0 {
			s.free[i]--
			return i, true
		}
	}
	return 0, false
}

// give frees a slot whose device is known to be gone.
func (s *slots) give(segment int) { s.free[segment]++ }

func (s *slots) total() int {
	n := 0
	for _, f := range s.free {
		n += f
	}
	return n
}
