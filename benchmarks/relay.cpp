// The switch of thinnet.py where the kernel has no netem: it joins the ranks' interfaces, which are TAP devices, and
// gives every link its rate and every path its delay.
//
//     relay INTERFACE DELAY_NS JITTER_NS LOSS NAMESPACE...
//
// makes INTERFACE in each network namespace (a file's path) and says "ready". Then it reads commands from stdin, a
// line each, and answers each with a line; it ends when stdin does, so that nobody has to be alive to end it:
//
//     rate RANK BITS_PER_S QUEUE_BYTES      0 bits a second: no limit        ok
//     count                                 CPU seconds, then for each rank the frames that its link's full queues
//                                           dropped, and those of its own that were lost as LOSS asks
//
// A frame goes through the sender's uplink, the delay, and the receiver's downlink. Each link is a server in virtual
// time: a frame begins where the last one ended, however late our timer fires, so that a busy machine costs no rate.
// Its queue has an end, as a switch's port has, and what comes then is dropped.
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <malloc.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <queue>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Time = int64_t;  // nanoseconds of CLOCK_MONOTONIC

constexpr size_t HEADER = 10;  // virtio_net_hdr, before each frame: passed on as it is, it saves checksums
constexpr size_t LARGEST = HEADER + 16384;
constexpr int BATCH = 64;  // frames read from one rank before the others have their turn
constexpr Time LONGEST_TICK = 200'000;

struct Frame {
    size_t size;  // with HEADER
    int to;
    bool through_downlink;
    uint8_t bytes[LARGEST];  // only `size` of them are allocated

    size_t on_wire() const { return size - HEADER; }
    static Frame* make(size_t size) { return static_cast<Frame*>(malloc(offsetof(Frame, bytes) + size)); }
};

struct Event {
    Time at;
    uint64_t order;  // events of one moment happen in the order they were made
    Frame* frame;

    bool operator<(const Event& other) const { return at != other.at ? at > other.at : order > other.order; }
};

struct Link {
    double ns_per_byte = 0;
    double queue_ns = INFINITY;
    Time free = 0;

    void set_rate(double bits_per_s, double queue_bytes) {
        ns_per_byte = bits_per_s > 0 ? 8e9 / bits_per_s : 0;
        queue_ns = bits_per_s > 0 ? queue_bytes * ns_per_byte : INFINITY;
    }

    // Sends `size` bytes that are there at `at`; `free` is then when they have left. False: the queue has no room.
    bool send(Time at, size_t size) {
        const double ns = size * ns_per_byte;
        if (free - at + ns > queue_ns && free > at) return false;
        free = std::max(free, at) + std::llround(ns);
        return true;
    }
};

struct Rank {
    int tap;
    Link up, down;
    std::vector<Time> reached;  // each other rank: when the last frame from here arrived there
    std::mt19937_64 loss, jitter;  // of a fixed seed, so that every run draws the same
    uint64_t dropped = 0, lost = 0;
};

[[noreturn]] void fail(const std::string& what) {
    printf("%s: %s\n", what.c_str(), strerror(errno));
    exit(1);
}

Time now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * Time(1'000'000'000) + time.tv_nsec;
}

int make_tap(const char* name_space, const char* interface) {
    const int target = open(name_space, O_RDONLY | O_CLOEXEC);
    if (target < 0 || setns(target, CLONE_NEWNET)) fail(name_space);
    close(target);
    const int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tap < 0) fail("/dev/net/tun");
    ifreq request{};
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    strncpy(request.ifr_name, interface, IFNAMSIZ - 1);
    if (ioctl(tap, TUNSETIFF, &request)) fail("TUNSETIFF");
    ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM);  // may fail: then the kernel makes the checksums, as we do not need them
    return tap;
}

class Switch {
public:
    Switch(Time delay, Time jitter, double loss) : delay_(delay), jitter_(jitter), loss_(loss) {
        // Frames that are due within a tick leave together: fewer wake-ups, for a hundredth of the delay at most.
        tick_ = std::max<Time>(1, std::min(LONGEST_TICK, delay / 50));
    }

    void add(int tap) {
        const uint64_t seed = ranks_.size() + 1;
        ranks_.push_back({tap, {}, {}, {}, std::mt19937_64(seed), std::mt19937_64(seed + 1000)});
        for (Rank& rank : ranks_) rank.reached.resize(ranks_.size());
    }

    void receive(int from) {
        for (int i = 0; i < BATCH; ++i) {
            if (!spare_) spare_ = Frame::make(LARGEST);
            const ssize_t size = read(ranks_[from].tap, spare_->bytes, LARGEST);
            if (size <= static_cast<ssize_t>(HEADER + 14)) return;  // EAGAIN, or nothing that a rank would send
            spare_->size = size;
            forward(from, *spare_);
        }
    }

    // Everything that is due.
    void run() {
        const Time present = now();
        while (!events_.empty() && events_.top().at <= present) {
            const auto [at, order, frame] = events_.top();
            events_.pop();
            Rank& to = ranks_[frame->to];
            if (frame->through_downlink) {
                // Fails where the interface is down: nobody misses the frame.
                if (write(to.tap, frame->bytes, frame->size) < 0) {}
                free(frame);
            } else if (to.down.send(at, frame->on_wire())) {
                frame->through_downlink = true;
                events_.push({to.down.free, made_++, frame});
            } else {
                ++to.dropped;
                free(frame);
            }
        }
    }

    // The tick in which `at` falls ends then. What happens within a tick is handled together: fewer wake-ups.
    Time tick_end(Time at) const { return (at + tick_ - 1) / tick_ * tick_; }

    // When something is due next; 0: never.
    Time next() const { return events_.empty() ? 0 : tick_end(events_.top().at); }

    std::string command(const char* line) {
        int rank;
        double bits_per_s, queue_bytes;
        if (sscanf(line, "rate %d %lf %lf", &rank, &bits_per_s, &queue_bytes) == 3 && rank >= 0 &&
            rank < static_cast<int>(ranks_.size())) {
            ranks_[rank].up.set_rate(bits_per_s, queue_bytes);
            ranks_[rank].down.set_rate(bits_per_s, queue_bytes);
            return "ok";
        }
        if (strcmp(line, "count")) return "unknown command";
        timespec cpu;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
        std::string answer = std::to_string(cpu.tv_sec + cpu.tv_nsec * 1e-9);
        for (const Rank& rank : ranks_) answer += " " + std::to_string(rank.dropped) + " " + std::to_string(rank.lost);
        return answer;
    }

private:
    void forward(int from, const Frame& frame) {
        Rank& sender = ranks_[from];
        const uint8_t* ethernet = frame.bytes + HEADER;
        owner_[address(ethernet + 6)] = from;
        if (!sender.up.send(now(), frame.on_wire())) {
            ++sender.dropped;
            return;
        }
        // An address that is not found is asked for again after a second only, on one wire; a long path has none.
        const bool is_arp = ethernet[12] == 0x08 && ethernet[13] == 0x06;
        if (loss_ > 0 && !is_arp && share(sender.loss) < loss_) {
            ++sender.lost;
            return;
        }
        const auto owner = owner_.find(address(ethernet));
        if (owner != owner_.end() && !(ethernet[0] & 1)) return path(from, owner->second, frame);
        for (int to = 0; to < static_cast<int>(ranks_.size()); ++to) path(from, to, frame);
    }

    void path(int from, int to, const Frame& frame) {
        if (to == from) return;
        Rank& sender = ranks_[from];
        Time at = sender.up.free + delay_;
        if (jitter_) at += std::llround((2 * share(sender.jitter) - 1) * jitter_);
        Time& reached = sender.reached[to];
        reached = at = std::max(at, reached);  // no frame overtakes another
        Frame* copy = Frame::make(frame.size);
        memcpy(copy->bytes, frame.bytes, frame.size);
        copy->size = frame.size;
        copy->to = to;
        copy->through_downlink = false;
        events_.push({at, made_++, copy});
    }

    static double share(std::mt19937_64& random) { return (random() >> 11) * 0x1p-53; }

    static uint64_t address(const uint8_t* bytes) {
        uint64_t whole = 0;
        memcpy(&whole, bytes, 6);
        return whole;
    }

    const Time delay_, jitter_;
    const double loss_;
    Time tick_;
    std::vector<Rank> ranks_;
    std::unordered_map<uint64_t, int> owner_;  // of an Ethernet address, as seen in what it sent
    std::priority_queue<Event> events_;
    uint64_t made_ = 0;
    Frame* spare_ = nullptr;
};

// Two busy cores would keep us waiting for milliseconds, which a rank would see as delay.
void hurry() {
    const sched_param first{1};
    if (sched_setscheduler(0, SCHED_FIFO, &first)) setpriority(PRIO_PROCESS, 0, -10);  // may fail too
}

void watch(int poll, int file, uint32_t what) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u32 = what;
    if (epoll_ctl(poll, EPOLL_CTL_ADD, file, &event)) fail("epoll_ctl");
}

}  // namespace

int main(int count, char** arguments) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    if (count < 6) {
        puts("usage: relay INTERFACE DELAY_NS JITTER_NS LOSS NAMESPACE...");
        return 2;
    }
    mallopt(M_TRIM_THRESHOLD, 1 << 30);  // frames come and go; giving their memory back each time costs calls
    mallopt(M_TOP_PAD, 4 << 20);
    const uint32_t ranks = count - 5, timer_fired = ranks, command_came = ranks + 1;
    const int poll = epoll_create1(EPOLL_CLOEXEC);
    const int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    const int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (poll < 0 || timer < 0 || home < 0) fail("starting");
    Switch center(atoll(arguments[2]), atoll(arguments[3]), atof(arguments[4]));
    for (uint32_t rank = 0; rank < ranks; ++rank) {
        const int tap = make_tap(arguments[5 + rank], arguments[1]);
        center.add(tap);
        watch(poll, tap, rank);
    }
    if (setns(home, CLONE_NEWNET)) fail("going home");  // who ends all that runs in a rank's namespace spares us
    watch(poll, timer, timer_fired);
    watch(poll, STDIN_FILENO, command_came);
    fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK);
    hurry();
    puts("ready");

    std::string input;
    std::vector<epoll_event> ready(ranks + 2);
    Time armed = 0;
    for (;;) {
        bool received = false;
        const int n = epoll_wait(poll, ready.data(), ready.size(), -1);
        for (int i = 0; i < n; ++i) {
            const uint32_t what = ready[i].data.u32;
            if (what < ranks) {
                center.receive(what);
                received = true;
            }
            if (what != command_came) continue;
            char bytes[4096];
            const ssize_t size = read(STDIN_FILENO, bytes, sizeof bytes);
            if (size == 0 || (size < 0 && errno != EAGAIN && errno != EINTR)) return 0;
            if (size > 0) input.append(bytes, size);
            for (size_t end; (end = input.find('\n')) != std::string::npos; input.erase(0, end + 1)) {
                puts(center.command(input.substr(0, end).c_str()).c_str());
            }
        }
        center.run();
        if (received) {  // more is about to come
            const Time end = center.tick_end(now());
            const timespec until{end / 1'000'000'000, end % 1'000'000'000};
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
            center.run();
        }
        // Armed anew also after it fired, or it would stay readable.
        const Time next = center.next();
        if (next != armed || (armed && armed <= now())) {
            itimerspec alarm{{}, {next / 1'000'000'000, next % 1'000'000'000}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &alarm, nullptr);
            armed = next;
        }
    }
}
